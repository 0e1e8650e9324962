"""Compiled graphs where numbers end: fp16 sums beyond 65504, denominators of zero, eps that fp16
cannot hold. The operator by itself is in tests/ops/test_op_numerics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fuzz.checking import Rewritten

GUARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "1e-15": lambda z: z + 1e-15,
    "clamp": lambda z: z.clamp(min=1e-15),
    "clamp at 1": lambda z: z.clamp(min=1.0),
    "maximum": lambda z: torch.maximum(z, torch.full_like(z, 1e-6)),
}


def attention(guard: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.relu(), k.relu()
        return q @ (k.mT @ v) / GUARDS[guard](q @ k.sum(-2).unsqueeze(-1))

    return function


def compiled(function: Any, *inputs: Tensor) -> Tensor:
    backend = Rewritten(functional=True)
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    assert len(backend.report.matches) == 1
    return out


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("kind", ["zero rows of q", "zero keys", "negative values of no weight"])
def test_denominators_of_zero(guard, kind):
    """NaN where the user's graph gives NaN, and numbers where it gives numbers."""
    q, k, v = (torch.randn(2, 3, 6, 4) for _ in range(3))
    if kind == "zero rows of q":
        q[:, :, 2] = -1.0
    elif kind == "zero keys":
        k[:, 1] = -1.0
    else:
        q[:, :, 2], k[:, :, 3], v[:, :, 3] = -1.0, -1.0, -1e30
    function = attention(guard)
    eager = function(q, k, v)
    assert eager.isnan().any() == (guard == "none")
    torch.testing.assert_close(compiled(function, q, k, v), eager, equal_nan=True)


@pytest.mark.parametrize("guard", GUARDS)
def test_long_fp16_sequences_are_finite_where_fp32_is(guard):
    q, k = torch.randn(1, 1, 20, 8).half(), (torch.rand(1, 1, 65536, 8) * 100).half()
    v = torch.rand(1, 1, 65536, 8).half() * 100
    function = attention(guard)
    wide = function(q.float(), k.float(), v.float())
    assert not function(q, k, v).isfinite().all()
    out = compiled(function, q, k, v)
    assert (out.isfinite() | ~wide.half().isfinite()).all()
    assert wide.isfinite().all()


def test_an_eps_that_fp16_cannot_hold_is_not_lost():
    """The user's graph divides 0 by 0 there; the operator does what the same graph does in fp32."""
    q, k, v = (torch.randn(1, 2, 6, 4).half() for _ in range(3))
    q[:, :, 2] = -1.0
    function = attention("1e-15")
    assert function(q, k, v)[:, :, 2].isnan().all()
    out = compiled(function, q, k, v)
    assert (out[:, :, 2] == 0).all()
    torch.testing.assert_close(out.float(), function(q.float(), k.float(), v.float()), **LOOSE)


LOOSE = {"rtol": 2**-10, "atol": 1e-3}  # one rounding to fp16
