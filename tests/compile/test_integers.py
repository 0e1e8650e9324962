"""Numbers that are not what they seem: integers that wrap around, divisors without an inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.compile.rewriting import compiled, matched

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scaled(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ ((k * 3).float().mT @ v)


def negated(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ ((-k).float().mT @ v)


def weighted(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ ((k * weight).long().float().mT @ v)


def promoted(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ ((k * weight * v).mT @ v)


def converted_first(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ ((k.float() * weight).mT @ v)


def state_of_integers(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    return q @ (k.mT @ k).float()


@pytest.mark.parametrize(
    ("function", "matches"),
    [
        (scaled, 1),
        (negated, 1),
        (weighted, 1),
        (promoted, 1),
        (converted_first, 1),
        (state_of_integers, 0),
    ],
)
def test_integers_wrap_around(function: Function, matches: int) -> None:
    q, v = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    k = torch.randint(0, 100, (2, 3, 20, 8), dtype=torch.uint8)
    weight = torch.randint(0, 100, (2, 1, 20, 1), dtype=torch.uint8)
    got, want = compiled(function)(q, k, v, weight), function(q, k, v, weight)
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert matched() == matches


def test_masks_in_integers_are_told_apart() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.int()
        return (q @ k.mT * (mask[..., None] * mask[..., None, :]).float()) @ v

    args = [*torch.randn(3, 2, 20, 8), torch.rand(2, 20) < 0.5]
    torch.testing.assert_close(compiled(function)(*args), function(*args))
    assert matched() == 1


def test_a_divisor_whose_inverse_is_infinite() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q / 1e-310) @ (k.mT @ v)

    q, k, v = torch.randn(3, 2, 20, 8, dtype=torch.float64)
    args = q * 1e-308, k, v
    torch.testing.assert_close(compiled(function)(*args), function(*args))
