"""The whole path on a GPU: recognised, rewritten, through Inductor, and no less accurate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import run_fw_bw_and_get_code

from tests.compile import spellings
from tests.numerics import assert_no_less_accurate

pytestmark = pytest.mark.gpu

NAMES = [
    "simple_at",
    "softmax_features",
    "images_tokens_last",
    "mean_normaliser",
    "three_operand_einsum",
    "row_normalised_quadratic",
    "ones_row_on_values",
    "from_one_projection",
    "decoupled",
    "one_headed_keys",
]
CASES = [s for s in spellings.SPELLINGS if s.name in NAMES]


def tensors(case: spellings.Spelling, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in case.shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_spelling(case: spellings.Spelling, dtype: torch.dtype) -> None:
    """At toy sizes the cost model may decline; here the kernels are meant, so always."""
    counters.clear()
    options = {"rewrite": "always"}
    run = torch.compile(case.function, backend="bla", options=options, fullgraph=True)
    # fp32: eager's sums of 20 terms round by chance; 16 bit: the result's rounding decides.
    assert_no_less_accurate(run, case.function, tensors(case, dtype), factor=1.5, roundings=8.0)
    assert counters["bla"]["matched"] == case.matches


def attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def big(n: int = 512, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shape = (2, 4, n, 64)
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    counters.clear()
    run = torch.compile(attention, backend="bla", mode=mode, fullgraph=True)
    args = big()
    for _ in range(3):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        out = run(*args)
        torch.testing.assert_close(out, attention(*args), rtol=3e-2, atol=3e-2)
        # .grad would outlive the replay that owns its memory
        (dq, *_) = torch.autograd.grad(out.sum(), args)
        assert torch.isfinite(dq).all()
    assert counters["bla"]["matched"] == 1


def test_a_new_length_compiles_nothing() -> None:
    counters.clear()
    run = torch.compile(attention, backend="bla", fullgraph=True, dynamic=True)
    for n in (512, 700, 1024):
        args = big(n)
        torch.testing.assert_close(run(*args), attention(*args), rtol=3e-2, atol=3e-2)
    assert counters["bla"]["graphs"] == 1


def test_autocast() -> None:
    args = big(dtype=torch.float32)
    counters.clear()
    run = torch.compile(attention, backend="bla", fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        ours, eager = run(*args), attention(*args)
    assert counters["bla"]["matched"] == 1
    assert ours.dtype == eager.dtype
    exact = attention(*(x.double() for x in args))
    assert (ours - exact).norm() <= 1.1 * (eager - exact).norm()
    ours.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_users_fp32_upcast_is_honoured(dtype: torch.dtype) -> None:
    """16 bit in and out, products in fp32: the result and every gradient as accurate as eager's."""

    def formula(q, k, v):
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-15)

    def model(q, k, v):
        return formula(F.relu(q).float(), F.relu(k).float(), v.float()).to(dtype)

    args = big(2048, dtype)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    exact = formula(F.relu(exact_args[0]), F.relu(exact_args[1]), exact_args[2])
    do = torch.randn_like(exact).to(dtype)
    truth = [exact, *torch.autograd.grad(exact, exact_args, do.double())]
    counters.clear()
    run = torch.compile(model, backend="bla", fullgraph=True)
    errors = []
    for function in (run, model):
        out = function(*args)
        got = [out, *torch.autograd.grad(out, args, do)]
        pairs = zip(got, truth, strict=True)
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])
    assert counters["bla"]["matched"] == 1
    for ours, eager in zip(*errors, strict=True):
        assert ours <= 1.1 * eager, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_powers_with_learned_exponents(dtype: torch.dtype) -> None:
    """exp(p · log x) for what was rounded to 16 bits: result and gradients as accurate as pow's."""

    def model(q, k, v, p):
        p = 1 + 4 * torch.sigmoid(p)
        q, k = (torch.cat([F.relu(s * x) ** p for s in (1, -1)], -1) for x in (q, k))
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)

    exponents = torch.randn(4, 1, 64, device="cuda").to(dtype).requires_grad_()
    args = [*(x.detach().clamp(-1.5, 1.5).requires_grad_() for x in big(1024, dtype)), exponents]
    counters.clear()
    run = torch.compile(model, backend="bla", fullgraph=True)
    _, sources = run_fw_bw_and_get_code(lambda: run(*args))
    assert counters["bla"]["matched"] == 1
    assert len(sources) == 2
    assert not any("libdevice.pow" in source for source in sources)
    assert_no_less_accurate(run, model, args)
