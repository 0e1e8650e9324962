"""More spellings and look-alikes, by the analysis and the rewritten graph alone: nothing but Dynamo
compiles, and the graph runs eagerly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import bla_inductor
from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite
from tests.compile import (
    spellings_around,
    spellings_chunks,
    spellings_divisors,
    spellings_in_place,
    spellings_masks,
    spellings_outer,
    spellings_papers,
    spellings_sums,
    spellings_weights,
)
from tests.compile.further import FURTHER, NEAR_MISSES, Further
from tests.compile.spellings import N
from tests.numerics import assert_no_less_accurate

# A row sums over twenty tokens, so eager's own error is a matter of luck; a wrong term is 1e-3 off.
ROUNDINGS = 4.0

# imported for the rows they add
_ = (
    spellings_around,
    spellings_chunks,
    spellings_divisors,
    spellings_in_place,
    spellings_masks,
    spellings_outer,
    spellings_papers,
    spellings_sums,
    spellings_weights,
)


class Rewritten:
    """Runs `function` through Dynamo and the rewrite; keeps the reports."""

    def __init__(self, function: Any, dynamic: bool) -> None:
        self.reports: list[bla_inductor.Report] = []
        self.run = torch.compile(function, backend=self._compile, fullgraph=True, dynamic=dynamic)

    def _compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.reports.append(rewrite(gm, inputs, Options()))
        return gm.forward

    @property
    def report(self) -> bla_inductor.Report:
        (report,) = self.reports
        return report


def inputs(case: Further, extra: int = 0) -> list[torch.Tensor]:
    """Random inputs; `extra` more tokens and keys, where an axis is that long."""
    generator = torch.Generator().manual_seed(extra)
    longer = {N: N + extra, 16: 16 + extra, 32: 32 + extra, 40: 40 + extra}
    longer |= {50: 50 + extra, 60: 60 + extra, 80: 80 + extra}
    shapes = [tuple(longer.get(size, size) for size in shape) for shape in case.shapes]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", FURTHER, ids=lambda c: c.name)
def test_spelling(case: Further, dynamic: bool) -> None:
    """Matched as told, exact to rounding with every gradient; symbolic sizes serve two lengths."""
    rewritten = Rewritten(case.function, dynamic)
    lengths = (0, 8) if dynamic and case.lengths else (0,)
    for extra in lengths:
        args = inputs(case, extra)
        assert_no_less_accurate(rewritten.run, case.function, args, roundings=ROUNDINGS)
    report = rewritten.report
    assert ["÷" in match.formula for match in report.matches] == [case.normalised] * case.matches
    assert all(("' = " in match.formula) == case.decoupled for match in report.matches)
    reasons = [refusal.reason for refusal in report.refusals]
    assert len(reasons) == bool(case.reason)
    assert all(case.reason in reason for reason in reasons)


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda c: c.name)
def test_near_miss(case: Further) -> None:
    rewritten = Rewritten(case.function, dynamic=False)
    torch.testing.assert_close(rewritten.run(*inputs(case)), case.function(*inputs(case)))
    report = rewritten.report
    assert report.matches == []
    assert any(case.reason in refusal.reason for refusal in report.refusals) or not case.reason
