"""Numerics as properties: the error against fp64 next to the user's own, long fp16 sequences with
large keys, denominators at and near zero, and what is not finite.

A 16-bit result is rounded once, after sums that are exact in comparison, so there our error is at
most 1.1 times that of the naive graph, tensor by tensor. In fp32 that cannot hold for every tensor:
both are sums of the same rounded products in another order, and either order may be the luckier
one by tens of percent. It holds on average, which is what is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_attention_formula import operator, plain, positive, relative_error, results
from torch import Tensor

fp16, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
RELU = "Piecewise((0, x <= 0), (x, True))"
GUARDS = [("add", 1e-15), ("add", 1e-6), ("clamp", 1e-15), ("clamp", 1e-6), ("add", 0.0)]


def errors(function: Any, tensors: list[Tensor], do: Tensor, **numbers: Any) -> dict[str, float]:
    """‖· - exact‖ / ‖exact‖ of the output and every gradient."""
    wide = [t.double() for t in tensors]
    exact = results(plain, wide, do.double(), **numbers)
    got = results(function, tensors, do, **numbers)
    return {name: relative_error(got[name], exact[name]) for name in exact}


INPUTS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "plain": lambda dtype: [positive(2, s, 16, dtype=dtype) for s in (200, 300)],
    "large": lambda dtype: [positive(2, s, 16, dtype=dtype) * 50 for s in (200, 300)],
    "tiny": lambda dtype: [(positive(2, s, 16, dtype=fp32) / 1000).to(dtype) for s in (200, 300)],
    "few keys": lambda dtype: [positive(2, 300, 16, dtype=dtype), positive(2, 3, 16, dtype=dtype)],
}


@pytest.mark.parametrize(("normalizer", "eps"), [*GUARDS[:4], ("none", 0.0)])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
def test_error_against_fp64(kind, normalizer, eps, dtype):
    scale = {"large": 1e-6, "tiny": 1e4}.get(kind, 1e-2) if normalizer == "none" else 1.0
    numbers = {"normalizer": normalizer, "eps": eps, "scale": scale}
    factor = 1.1
    ours: dict[str, float] = {}
    eager: dict[str, float] = {}
    for seed in range(6):
        torch.manual_seed(seed)
        q, k = INPUTS[kind](dtype)
        tensors = [q + 1e-3, k + 1e-3, torch.randn(2, k.shape[1], 16).to(dtype)]
        do = torch.randn(2, q.shape[1], 16).to(dtype)
        for total, function in ((ours, operator), (eager, plain)):
            for name, value in errors(function, tensors, do, **numbers).items():
                total[name] = total.get(name, 0.0) + value / 6
    floor = torch.finfo(dtype).eps / 2  # the result is rounded, however it was computed
    for name, value in ours.items():
        assert value <= factor * max(eager[name], floor), f"{name}: {value:.3e} {eager[name]:.3e}"


@pytest.mark.parametrize(("normalizer", "eps"), [*GUARDS, ("none", 0.0)])
@pytest.mark.parametrize("out_dtype", [None, fp32])
def test_long_fp16_with_large_keys_is_finite_where_fp32_is(normalizer, eps, out_dtype):
    q, k = positive(1, 50, 8, dtype=fp16), torch.rand(1, 65536, 8).mul(100).half()
    v, do = torch.rand(1, 65536, 8).half() * 100, torch.randn(1, 50, 8).half()
    numbers = {"normalizer": normalizer, "eps": eps}
    numbers |= {"scale": 1e-8} if normalizer == "none" else {}
    q[:, 7] = 0.0
    ours = results(operator, (q, k, v), do, **numbers, out_dtype=out_dtype)
    eager = results(plain, [t.float() for t in (q, k, v)], do.float(), **numbers)
    for name, value in ours.items():
        finite = eager[name].to(value.dtype).isfinite()
        assert value[finite].isfinite().all(), name
        assert finite.all() or name != "out" or (eps == 0.0 and normalizer != "none")


def assert_alike(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """NaN, infinities with their signs, and numbers, in the same places."""
    for name, value in ours.items():
        expected = eager[name].to(value.dtype)
        torch.testing.assert_close(
            value, expected, equal_nan=True, rtol=1e-4, atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize(("normalizer", "eps"), [*GUARDS, ("add", 1.0)])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [fp32, fp64])
def test_denominators_of_zero(normalizer, eps, decoupled, dtype):
    """A row of zeros in q', with a numerator of zero, or (decoupled) a positive or negative one."""
    q, k = torch.rand(1, 6, 4, dtype=dtype), torch.rand(1, 5, 4, dtype=dtype)
    v, do = torch.randn(1, 5, 3, dtype=dtype), torch.randn(1, 6, 3, dtype=dtype)
    tensors = [q, k, v]
    if decoupled:
        tensors += [torch.rand(1, 6, 4, dtype=dtype), torch.rand(1, 5, 4, dtype=dtype)]
    tensors[3 if decoupled else 0][:, 2] = 0.0
    numbers = {"normalizer": normalizer, "eps": eps}
    ours, eager = (results(f, tensors, do, **numbers) for f in (operator, plain))
    if eps == 0.0:
        kind = torch.isinf if decoupled else torch.isnan
        assert kind(eager["out"][:, 2]).all()
    assert_alike(ours, eager)


@pytest.mark.parametrize("exponent", [-10, -20, -30, -36, -39, -42])
@pytest.mark.parametrize("normalizer", ["add", "clamp"])
def test_denominators_near_zero(normalizer, exponent):
    q = torch.rand(1, 6, 4) + 0.5
    q[:, 2:4] *= 10.0**exponent
    k, v = torch.rand(1, 5, 4) + 0.5, torch.randn(1, 5, 3)
    ours, eager = (f(q, k, v, normalizer=normalizer, eps=0.0) for f in (operator, plain))
    assert eager.isfinite().all()
    torch.testing.assert_close(ours, eager, rtol=1e-4 if exponent > -38 else 0.05, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["none", "add", "clamp"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_not_finite_spreads_as_in_the_formula(normalizer, place, bad, mapped):
    tensors = [torch.rand(2, s, 4) + 0.1 for s in (6, 5, 5)]
    tensors["qkv".index(place)][1, 2, 3] = bad
    maps = {"q_map": RELU, "k_map": RELU} if mapped else {}
    numbers = {"normalizer": normalizer, "eps": 1e-6}
    ours, eager = (f(*tensors, **numbers, **maps) for f in (operator, plain))
    assert_alike({"out": ours}, {"out": eager})
    assert ours[0].isfinite().all()
