"""A compiled module beside the module itself and the module in fp64: outputs and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.numerics import assert_within_budget, error

__all__ = ["assert_same", "stirred"]

# One draw of a model's error is luck in either direction, where some divisor is small by as much as
# a factor of two. Eager's is therefore the largest of as many runs, on inputs a rounding apart.
EAGER_RUNS = 4
# So is that of a single parameter, which therefore has only to be right; all of them together have
# to be as accurate as eager's.
RIGHT = 1e-3

Call = tuple[list[Tensor], dict[str, Any]]


def stirred(model: Callable[..., Any]) -> Callable[..., Any]:
    """No parameter left at zero or one, where its gradient might be right by accident."""
    if isinstance(model, nn.Module):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def _results(run: Callable[..., Any], module: nn.Module, call: Call) -> list[list[Tensor]]:
    """The outputs, and the gradients of the inputs and of the parameters of `module`."""
    inputs = [x.detach().clone().requires_grad_() for x in call[0]]
    outputs = [x for x in pytree.tree_leaves(run(*inputs, **call[1])) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(17)
    incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    sources = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(
        outputs,
        sources,
        [g.to(x) for g, x in zip(incoming, outputs, strict=True)],
        allow_unused=True,
        materialize_grads=True,
    )
    return [[x.detach() for x in outputs], list(grads[: len(inputs)]), list(grads[len(inputs) :])]


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _nudged(call: Call) -> Call:
    """The same inputs, each entry off by about one rounding."""
    return [x + x * torch.randn_like(x) * torch.finfo(x.dtype).eps for x in call[0]], call[1]


def assert_same(run: Callable[..., Any], module: nn.Module, call: Call) -> None:
    """`run`, compiled from `module`, computes what it computes, no less accurately.

    Every output, the gradient of every input, and those of all parameters as one vector, against
    fp64 within the budget of tests/numerics.py; each parameter's by itself to three digits.
    """
    ours = _results(run, module, call)
    calls = [call, *(_nudged(call) for _ in range(EAGER_RUNS - 1))]
    eager = [_results(module, module, c) for c in calls]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # for what the module makes on the way
        reference = copy.deepcopy(module).double()
        exact = _results(reference, reference, pytree.tree_map(_double, call))
    finally:
        torch.set_default_dtype(default)

    def within_budget(name: str, pick: Callable[[list[list[Tensor]]], Tensor]) -> None:
        truth = pick(exact)
        theirs = max(map(pick, eager), key=lambda x: error(x, truth))
        assert_within_budget(name, pick(ours), theirs, truth)

    for i in range(len(exact[0])):
        within_budget(f"output {i}", lambda r, i=i: r[0][i])
    for i in range(len(call[0])):
        within_budget(f"gradient of input {i}", lambda r, i=i: r[1][i])
    if not exact[2]:
        return
    within_budget("gradient of the parameters", lambda r: torch.cat([g.flatten() for g in r[2]]))
    total = torch.stack([g.norm() for g in exact[2]]).norm()
    floor = RIGHT * 1e-3 * total  # for those that are zero
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    for name, mine, truth in zip(names, ours[2], exact[2], strict=True):
        assert (mine - truth).norm() <= RIGHT * truth.norm() + floor, f"gradient of {name}"
