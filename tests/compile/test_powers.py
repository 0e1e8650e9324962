"""Powers of what was rounded to 16 bits: exp(p · log x), no less exact, and no others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import (
    aot_function,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bla_inductor.powers import powers_by_logarithm
from bla_inductor.stamp import CacheStamp
from tests.compile import nogpu

aten, bla = torch.ops.aten, torch.ops.bla
B, H, N, D = 2, 2, 24, 8
POWERS = (aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar)


def attention(q: Tensor, k: Tensor) -> Tensor:
    return bla.linear_attention(q, k, k, normalizer="add", eps=1e-6)


def learned(x: Tensor, p: Tensor) -> Tensor:
    """PolaFormer's: both signs of both, one exponent a channel."""
    parts = [F.relu(s * x) ** p for s in (1, -1)]
    return attention(torch.cat(parts, -1), torch.cat(parts[::-1], -1))


def scaled(x: Tensor, p: Tensor) -> Tensor:
    """As autocast has it: powers in fp32 of what was bf16 before."""
    x = (x + p) / p
    return attention((F.relu(x) ** p).bfloat16(), x.bfloat16())


def written(x: Tensor, p: Tensor) -> Tensor:
    return attention(x.abs() ** 2.3, x.sigmoid() ** p)


def of_any_sign(x: Tensor, p: Tensor) -> Tensor:
    return attention(x**p, x)


def whole(x: Tensor, p: Tensor) -> Tensor:
    return attention(x.relu() ** 3, x.relu() ** 2.5 * x.relu() ** 2.0)


def without_attention(x: Tensor, p: Tensor) -> Tensor:
    return x.relu() ** p


def graphs(function: Callable[..., Any], x: Tensor, p: Tensor) -> list[fx.GraphModule]:
    """The forward and the backward graph, as Inductor's passes get them."""
    from torch._inductor.decomposition import select_decomp_table

    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        seen.append(gm)
        return make_boxed_func(gm)

    table = {op: f for op, f in select_decomp_table().items() if "bla" not in str(op)}
    leaves = [t.detach().requires_grad_() for t in (x, p)]
    compiled = aot_function(
        function, keep, keep, min_cut_rematerialization_partition, decompositions=table
    )
    compiled(*leaves).float().sum().backward()
    return seen


def left(gm: fx.GraphModule) -> int:
    return sum(node.target in POWERS for node in gm.graph.nodes)


def example(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, N, D).to(dtype), (1 + 4 * torch.rand(H, 1, D)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [learned, written, of_any_sign], ids=lambda f: f.__name__)
def test_no_power_stays_in_either_graph(function: Callable[..., Any], dtype: torch.dtype) -> None:
    for gm in graphs(function, *example(dtype)):
        before = left(gm)
        assert powers_by_logarithm(gm.graph, "cpu") == before > 0
        assert left(gm) == 0


def test_what_is_rounded_before_fp32_counts_as_rounded() -> None:
    x, p = example()
    for gm in graphs(scaled, x, p.float()):
        assert powers_by_logarithm(gm.graph, "cpu") > 0
        assert left(gm) == 0


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (learned, torch.float32),
        (learned, torch.float64),
        (whole, torch.bfloat16),
        (without_attention, torch.bfloat16),
    ],
)
def test_other_powers_stay(function: Callable[..., Any], dtype: torch.dtype) -> None:
    x, p = example(dtype)
    (gm, *_) = graphs(function, x, p)
    before = left(gm)
    assert powers_by_logarithm(gm.graph, "cpu") == 0
    assert left(gm) == before > 0


def test_other_devices_stay() -> None:
    (gm, *_) = graphs(learned, *example())
    assert powers_by_logarithm(gm.graph) == 0


def run_power(x: Tensor, p: Tensor | float, relu: bool = False) -> tuple[Tensor, Tensor]:
    """(aten's power, ours)."""

    def function(x: Tensor, p: Any) -> tuple[Tensor, Tensor]:
        power = F.relu(x) ** p if relu else x**p
        return attention(power, power), power

    inputs = (x, p) if isinstance(p, Tensor) else (x,)
    traced = function if len(inputs) == 2 else lambda x: function(x, p)
    gm = make_fx(traced, tracing_mode="fake")(*inputs)
    want = gm(*inputs)[1]
    assert powers_by_logarithm(gm.graph, "cpu") == 1
    gm.recompile()
    return want, gm(*inputs)[1]


INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, 1e-30, 2**-14, 0.5, 1.0, 1.0078125, 3.0, 200.0, 3e4, INF, NAN]
SPECIAL += [-0.5, -1.0, -3.0]  # and not -∞, whose powers are ∞ where those of others are no numbers
EXPONENTS = [0.0, 0.3, 1.0, 2.0, 2.3, 5.0, 40.0, -0.7, -1.0, -3.0, INF, -INF, NAN]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_ones_infinities_and_nan_are_pows(dtype: torch.dtype, relu: bool) -> None:
    x = torch.tensor(SPECIAL, dtype=dtype)[:, None].expand(-1, len(EXPONENTS)).contiguous()
    want, got = run_power(x, torch.tensor(EXPONENTS, dtype=dtype), relu)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("exponent", [2.3, -1.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_rounding(dtype: torch.dtype, exponent: float) -> None:
    x = (torch.rand(1 << 12, 16) * 20 + 0.05).to(dtype)
    for p in (exponent, torch.rand(16).to(dtype) * 4):
        want, got = run_power(x, p)
        exact = x.double() ** (p if isinstance(p, float) else p.double())
        known, ours = ((t.double() / exact - 1).abs() for t in (want, got))
        assert ours.max() <= 1.01 * known.max()
        assert ours.mean() <= 1.001 * known.mean()


def test_inductor_writes_no_pow_for_the_gpu() -> None:
    text = nogpu.code(learned, lambda make: [make.tensor(B, H, N, D), make.tensor(H, 1, D)])
    assert "libdevice.pow" not in text
    assert "tl_math.log" in text


def test_the_pass_runs_in_inductors_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from bla_inductor import stamp
    from bla_inductor.options import Options

    seen: list[Any] = []
    monkeypatch.setattr(stamp, "powers_by_logarithm", seen.append)
    graph = fx.Graph()
    CacheStamp(Options())(graph)
    assert seen == [graph]


def test_a_failure_of_the_pass_leaves_the_graph(monkeypatch, caplog) -> None:
    (gm, *_) = graphs(learned, *example())
    before = str(gm.graph)

    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    monkeypatch.setattr("bla_inductor.powers._by_logarithm", fail)
    with caplog.at_level(logging.WARNING, logger="bla_inductor"):
        assert powers_by_logarithm(gm.graph, "cpu") == 0
    assert str(gm.graph) == before
    assert "powers are computed as they were written" in caplog.text
