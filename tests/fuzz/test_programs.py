"""Any program gives the same rewritten as before, forward and backward; near misses stay as they
are, with a reason.

Small and the same every time in CI; `make fuzz SECONDS=600` goes on with new programs.
"""

from __future__ import annotations

import os
import time

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils import _pytree as pytree

from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite
from tests.fuzz.programs import Program, build, programs

SECONDS = float(os.environ.get("BLA_FUZZ_SECONDS", "0"))
END = time.monotonic() + SECONDS
FUZZ = settings(
    derandomize=not SECONDS,
    max_examples=10**6 if SECONDS else 30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
FACTOR = {torch.float32: 1.5, torch.bfloat16: 1.1}
ROUNDINGS = 16.0


class Rewritten:
    """A backend that rewrites, keeps the report, and runs the graph as it is then."""

    def __init__(self) -> None:
        self.report = Report()

    def __call__(self, gm, inputs):
        self.report += rewrite(gm, inputs, Options(rewrite="always", strict=True))
        return gm.forward


def results(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outs = [x for x in pytree.tree_leaves(function(*leaves)) if isinstance(x, Tensor)]
    wanted = [x for x in leaves if x.requires_grad]
    generator = torch.Generator().manual_seed(5)
    incoming = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    grads = torch.autograd.grad(outs, wanted, incoming, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in wanted]
    return [
        *(x.detach() for x in outs),
        *(z if g is None else g for g, z in zip(grads, zeros, strict=True)),
    ]


def error(got: Tensor, exact: Tensor) -> float:
    ratio = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-20)).item()
    return ratio if ratio == ratio else float("inf")


def check(p: Program) -> Report:
    if SECONDS and time.monotonic() > END:
        pytest.skip("the time is over")
    torch._dynamo.reset()
    torch.manual_seed(1)
    function, inputs = build(p)
    doubled = [
        x.detach().double().requires_grad_() if x.requires_grad else x.detach() for x in inputs
    ]
    reference, _ = build(Program(**{**p.__dict__, "dtype": "float32"}))
    try:
        truth, eager = results(reference, doubled), results(function, inputs)
    except RuntimeError:  # choices that do not go together in eager mode either
        hypothesis.reject()
    backend = Rewritten()
    mine = results(torch.compile(function, backend=backend, fullgraph=True), inputs)
    for i, (got, theirs, exact) in enumerate(zip(mine, eager, truth, strict=True)):
        assert got.shape == theirs.shape
        assert got.dtype == theirs.dtype
        low = torch.bfloat16 if p.dtype in ("bfloat16", "autocast", "upcast") else theirs.dtype
        budget = max(FACTOR[low] * error(theirs, exact), ROUNDINGS * torch.finfo(low).eps)
        assert error(got, exact) <= budget, f"result {i}: {p}\n{backend.report}"
    return backend.report


@FUZZ
@given(programs())
def test_programs(p: Program) -> None:
    report = check(p)
    hypothesis.event(f"{len(report.matches)} matches")
    hypothesis.target(float(len(str(p))))
    # An axis of size one is no axis: what is left is then another, smaller product.
    if min(p.N, p.M, p.D, p.Dv) > 1:
        assert len(report.matches) == 1, f"{p}\n{report}"


@FUZZ
@given(programs(near_miss=True))
def test_near_misses(p: Program) -> None:
    report = check(p)
    assert not report.matches, f"{p}\n{report}"
    # A projection is what every layer has, and an axis of size one is none: nobody asks.
    if p.near_miss != "parameter" and min(p.D, p.Dv) > 1:
        assert report.refusals, f"{p}: no reason was given"
