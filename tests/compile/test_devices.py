"""Tensors of several devices in one attention, with `meta` as the other one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bla_inductor
from tests.counted import counted

SHAPE = (2, 3, 20, 8)


def scaled_result(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * scale) @ v


def scaled_normaliser(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    scores = q @ k.mT * scale
    return scores @ v / (scores.sum(-1, keepdim=True) + 1)


def scaled_keys(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return q @ ((k * scale).mT @ v)


@pytest.mark.parametrize("function", [scaled_result, scaled_normaliser, scaled_keys])
def test_a_scalar_may_stay_on_the_cpu(function: Callable[..., Tensor]) -> None:
    tensors = [torch.empty(SHAPE, device="meta") for _ in range(3)]
    run = torch.compile(function, backend="bla", options={"inner": "aot_eager"}, fullgraph=True)
    out = run(*tensors, torch.tensor(2.0))
    assert counted() == {"graphs": 1, "matched": 1, "refused": 0}
    assert (out.shape, out.device.type) == (SHAPE, "meta")
    q, k, v = (torch.rand(SHAPE).relu() for _ in range(3))
    scale = torch.tensor(2.0)
    torch.testing.assert_close(run(q, k, v, scale), function(q, k, v, scale))


def test_a_tensor_is_read_where_it_was_moved_to() -> None:
    def function(q, k, v):
        return q @ (k.to(q.device).mT @ v)

    q, v = (torch.empty(SHAPE, device="meta") for _ in range(2))
    (match,) = bla_inductor.explain(function, q, torch.rand(SHAPE), v).matches
    assert "k = to" in match.formula
