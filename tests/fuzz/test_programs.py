"""Any program gives the same rewritten as before, forward and backward; near misses stay as they
are, with a reason.

Small and the same every time in CI; `make fuzz SECONDS=600` goes on with new programs.
"""

from __future__ import annotations

import hypothesis
from hypothesis import given

from tests.fuzz.budget import fuzz
from tests.fuzz.checking import check
from tests.fuzz.programs import NEAR_MISSES, SUSPECTS, Program, programs


@fuzz(20)
@given(programs())
def test_programs(p: Program) -> None:
    report = check(p)
    hypothesis.event(f"{len(report.matches)} matches")
    hypothesis.target(float(len(str(p))))
    refused = [r for r in report.refusals if "its gradient needs it" in r.reason]
    assert not refused or p.touch != "nothing"
    # An axis of size one is no axis: what is left is then another, smaller product.
    if min(p.N, p.M, p.D, p.Dv) > 1 and not refused and p.dynamic != "numbers too":
        # Both what escapes and what is made of it are replaced, where nobody asks for the cost.
        read = p.escape in ("numerator", "denominator") or p.dynamic != "no"
        most = 2 if read else 1
        assert 1 <= len(report.matches) <= most, f"{p}\n{report}"


@fuzz(14)
@given(programs(NEAR_MISSES))
def test_near_misses(p: Program) -> None:
    report = check(p)
    assert not report.matches, f"{p}\n{report}"
    # A projection is what every layer has, and an axis of size one is none: nobody asks.
    if p.near_miss not in ("parameter", "own key") and min(p.D, p.Dv) > 1:
        assert report.refusals, f"{p}: no reason was given"


@fuzz(10)
@given(programs(SUSPECTS))
def test_suspects(p: Program) -> None:
    report = check(p)
    if p.near_miss == "wrong normaliser" and min(p.N, p.D, p.Dv) > 1:
        # With N = M it is a normaliser of its own: q' is k, and k' is q.
        assert all("÷" not in m.formula or "q' = " in m.formula for m in report.matches), f"{p}"
