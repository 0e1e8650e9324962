"""Runs a program as it is and rewritten, and compares both with fp64."""

from __future__ import annotations

from typing import Any

import hypothesis
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite
from tests.fuzz.budget import assert_no_less_accurate
from tests.fuzz.programs import Program, build

__all__ = ["check"]

ROUNDINGS = 16.0


class Rewritten:
    """A backend that rewrites, keeps the report, and runs the graph as it is then."""

    def __init__(self, functional: bool) -> None:
        self.report = Report()
        self.functional = functional

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.report += rewrite(gm, inputs, Options(rewrite="always", strict=True))
        if not self.functional:
            return gm.forward
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def results(function: Any, inputs: list[Any]) -> dict[str, Tensor]:
    """The outputs, and the gradient of every input that requires one."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outs = [x for x in pytree.tree_leaves(function(*leaves)) if isinstance(x, Tensor)]
    named = {f"result {i}": x.detach() for i, x in enumerate(outs)}
    wanted = {f"gradient {i}": x for i, x in enumerate(leaves) if x.requires_grad}
    differentiable = [x for x in outs if x.requires_grad]
    if not wanted or not differentiable:
        return named
    generator = torch.Generator().manual_seed(5)
    incoming = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in differentiable]
    grads = torch.autograd.grad(differentiable, list(wanted.values()), incoming, allow_unused=True)
    return named | {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(wanted.items(), grads, strict=True)
    }


def check(p: Program) -> Report:
    """`p` gives the same rewritten as before, forward and backward; what was rewritten."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    function, inputs = build(p)
    reference, _ = build(Program(**{**p.__dict__, "dtype": "float32"}))

    def naive(given: list[Any]) -> dict[str, Tensor]:
        return results(function, given)

    def exact(given: list[Any]) -> dict[str, Tensor]:
        wide = [x.detach().double() if x.is_floating_point() else x.detach() for x in given]
        needed = [w.requires_grad_(x.requires_grad) for w, x in zip(wide, given, strict=True)]
        return results(reference, needed)

    try:
        naive(inputs), exact(inputs)
    except RuntimeError:  # choices that do not go together in eager mode either
        hypothesis.reject()
    report, mine = rewritten(p, inputs)
    low = p.stored if p.dtype not in ("autocast", "upcast", "norm upcast") else torch.bfloat16
    assert_no_less_accurate(mine, naive, exact, inputs, low, f"{p}\n{report}", roundings=ROUNDINGS)
    return report


def rewritten(p: Program, inputs: list[Tensor]) -> tuple[Report, dict[str, Tensor]]:
    """What was rewritten, and the results."""
    for functional in (False, True):
        torch._dynamo.reset()
        function, _ = build(p)
        backend = Rewritten(functional)
        compiled = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=True if p.dynamic != "no" else None
        )
        try:
            got = results(compiled, inputs)
            return backend.report, got
        except RuntimeError as error:
            # Autograd may object to views of what a custom function returned. Every backend but
            # this one makes the graph functional before it is run.
            if functional or "modified inplace" not in str(error):
                raise
    raise AssertionError
