"""Errors against fp64: the one measure of accuracy in these tests.

A rewritten function may not be less accurate than the user's own: for the result and every gradient
‖ours - fp64‖ ≤ FACTOR · ‖eager - fp64‖, with a floor of a few roundings for results that eager gets
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 1.1
ROUNDINGS = 2.0


def results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs, for one fixed incoming gradient."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return [out.detach()]
    generator = torch.Generator().manual_seed(17)
    incoming = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, wanted, incoming.to(out), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)),
    ]


def error(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖, infinite for anything not finite."""
    difference = (got.double().cpu() - exact.cpu()).norm()
    ratio = (difference / exact.cpu().norm().clamp(min=1e-30)).item()
    return ratio if ratio == ratio else float("inf")


def assert_no_less_accurate(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    factor: float = FACTOR,
    roundings: float = ROUNDINGS,
) -> None:
    """`ours` against `reference` on the same inputs, both against `reference` in fp64.

    roundings: the floor, in units of the dtype's eps; a deep model needs more than one operator.
    """
    exact = results(
        reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    )
    eager, got = results(reference, inputs), results(ours, inputs)
    assert got[0].stride() == eager[0].stride()
    names = ["output", *(f"gradient {i}" for i in range(len(exact) - 1))]
    for name, mine, theirs, truth in zip(names, got, eager, exact, strict=True):
        assert_within_budget(name, mine, theirs, truth, factor, roundings)


def assert_within_budget(
    name: str,
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    factor: float = FACTOR,
    roundings: float = ROUNDINGS,
) -> None:
    """‖ours - exact‖ ≤ factor · ‖eager - exact‖, or a few roundings of the dtype."""
    assert ours.shape == eager.shape
    assert ours.dtype == eager.dtype
    budget = max(factor * error(eager, exact), roundings * torch.finfo(eager.dtype).eps)
    assert error(ours, exact) <= budget, f"{name}: {error(ours, exact):.3e} > {budget:.3e}"
