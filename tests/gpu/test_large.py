"""Tiles for large tensors, most of them by descriptors, on tensors of every size."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from bla_inductor.kernels import heuristics, large
from torch._inductor.utils import run_fw_bw_and_get_code

from bla_inductor import ops  # noqa: F401
from tests.numerics import assert_no_less_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or heuristics.capability(torch.device("cuda")) != 9,
        reason="these tiles are for sm_90",
    ),
]

ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
FORMULA = {"q_map": ELU1, "k_map": ELU1, "normalizer": "add", "eps": 1e-6}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(large, "MIB", 0)
    with torch._inductor.config.patch(force_disable_caches=True):  # which know nothing of this
        yield


def attention(q, k, v):
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def operator(q, k, v):
    return torch.ops.bla.linear_attention(q, k, v, **FORMULA)


def tensors(d: int, dtype: torch.dtype, n: int = 1500, b: int = 2) -> list[torch.Tensor]:
    """Views of (B, N, H, D), rows at multiples of 16 bytes."""
    make = (torch.randn(b, n, 4, d, device="cuda") for _ in range(3))
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in make]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_operator(d: int, dtype: torch.dtype) -> None:
    args = tensors(d, dtype)

    def contiguous(q, k, v):  # eager's result is, and strides are compared
        return operator(q, k, v).contiguous()

    # In fp32 the order of the sums alone moves the error by tens of percent.
    factor = 1.5 if dtype == torch.float32 else 1.1
    assert_no_less_accurate(contiguous, attention, args, factor=factor)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("d", [32, 64])
def test_float32(d: int, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        test_operator(d, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("d", [40, 64, 80, 128, 160, 256])
def test_compiled(d: int, mode: str) -> None:
    torch._dynamo.reset()
    options = {"rewrite": "always", "mode": mode}
    run = torch.compile(attention, backend="bla", options=options, fullgraph=True)
    args = tensors(d, torch.bfloat16)
    _, sources = run_fw_bw_and_get_code(lambda: run(*args))
    assert any("TMA=True" in source for source in sources)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        out = run(*args)
        want = attention(*args)
        torch.testing.assert_close(out, want, rtol=3e-2, atol=3e-2)
        incoming = torch.randn_like(want)
        got = torch.autograd.grad(out, args, incoming)
        for a, b in zip(got, torch.autograd.grad(want, args, incoming), strict=True):
            assert (a - b).norm() <= 2e-2 * b.norm()


def test_the_same_graph_in_another_thread() -> None:
    """Triton's allocator is set for each thread, and from torch 2.13 on not at every launch."""
    torch._dynamo.reset()
    run = torch.compile(attention, backend="bla", fullgraph=True)
    args = tensors(80, torch.bfloat16)
    first = [run(*args) for _ in range(3)][-1]
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(run(*args)))
    thread.start()
    thread.join()
    assert len(results) == 1
    assert torch.equal(results[0], first)


@pytest.mark.parametrize("d", [32, 40, 64, 72, 128, 160])
def test_runs_are_equal(d: int) -> None:
    args = tensors(d, torch.bfloat16)
    runs = []
    for _ in range(3):
        out = operator(*args)
        runs.append([out, *torch.autograd.grad(out.sum(), args)])
    for again in runs[1:]:
        assert all(map(torch.equal, again, runs[0]))
