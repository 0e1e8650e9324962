"""What verification allows: the rule, and each exception to it, on both sides of its limit."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bla_inductor import BlaVerificationError, Comparison, Verification
from bla_inductor.verdict import coarsest, compare, pooled

EPS = torch.finfo(torch.float32).eps


def judged(ours: Tensor, original: Tensor, exact: Tensor | None, eps: float = EPS) -> Comparison:
    rows = None if exact is None else [exact]
    return compare(["x"], [None], [ours], [original], rows, eps)[0]


def off(exact: Tensor, error: float) -> Tensor:
    """`exact` in fp32, with a relative error."""
    noise = torch.randn(exact.shape, dtype=exact.dtype)
    return (exact + noise * (error * exact.norm() / noise.norm())).float()


@pytest.fixture
def exact() -> Tensor:
    return torch.randn(10_000, dtype=torch.float64)


def test_a_tenth_more_than_the_original_is_allowed(exact):
    original = off(exact, 1e-4)
    assert judged(off(exact, 1.12e-4), original, exact).ok  # 1.1 · (1 + 4 / 100)
    row = judged(off(exact, 1.2e-4), original, exact)
    assert not row.ok
    assert row.doubtful
    assert row.ours == pytest.approx(1.2e-4, rel=1e-2)
    assert row.original == pytest.approx(1e-4, rel=1e-2)


def test_a_few_roundings_are_allowed(exact):
    assert judged(off(exact, 7 * EPS), exact.float(), exact).ok
    assert not judged(off(exact, 9 * EPS), exact.float(), exact).ok
    half = torch.finfo(torch.bfloat16).eps
    for error, ok in ((1.8, True), (2.2, False)):
        ours = (exact * (1 + error * half)).bfloat16()
        assert judged(ours, exact.bfloat16(), exact).ok is ok


def test_few_entries_are_judged_by_the_coarsest_dtype_in_the_graph():
    few, coarse = torch.ones(3, dtype=torch.float64), torch.finfo(torch.bfloat16).eps
    assert judged(off(few, coarse), few.float(), few, coarse).ok
    assert not judged(off(few, coarse), few.float(), few).ok
    many = torch.ones(64, dtype=torch.float64)
    assert not judged(off(many, coarse), many.float(), many, coarse).ok
    assert coarsest([few, few.bfloat16(), few.half(), 3, torch.ones(3).bool()]) == coarse


def test_what_may_be_chance_is_judged_over_several_inputs(exact):
    original = 1e-4
    row = judged(off(exact, 1.3e-4), off(exact, original), exact)
    lucky = [row, *[replace(row, ours=0.9e-4)] * 7]
    (found,) = pooled([[r] for r in lucky])
    assert found.ok
    assert "8 inputs" in found.note
    (found,) = pooled([[replace(row, ours=1.6e-4)]] * 8)
    assert not found.ok
    fine = judged(exact.float(), exact.float(), exact)
    assert pooled([[fine], [row]]) == [fine]
    assert not judged(off(exact, 1e-2), off(exact, original), exact).doubtful


def test_cancellation_in_the_original_is_no_measure(exact):
    row = judged(off(exact, 1.0), off(exact, 0.2), exact)
    assert row.ok
    assert "lost its digits" in str(row)
    assert not judged(off(exact, 3.0), off(exact, 0.2), exact).ok


def test_a_gradient_that_is_zero_to_rounding_is_measured_by_the_others(exact):
    nothing = torch.zeros(100, dtype=torch.float64)
    for noise, ok in ((4 * EPS, True), (40 * EPS, False)):
        rows = compare(
            ["a", "b"],
            [None, None],
            [exact.float(), torch.full((100,), noise)],
            [exact.float(), nothing.float()],
            [exact, nothing],
            EPS,
        )
        assert rows[0].ok
        assert rows[1].ok is ok


def test_without_fp64_the_original_is_the_measure(exact):
    original = exact.float()
    assert judged(off(exact, 200 * EPS), original, None).ok
    row = judged(off(exact, 300 * EPS), original, None)
    assert not row.ok
    assert row.original is None
    assert not row.doubtful


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite(exact, value):
    """Ours may be finite where the original is not, and not the other way round."""
    broken = exact.float()
    broken[0] = value
    assert judged(exact.float(), broken, exact).ok
    assert judged(broken, broken, exact).ok
    assert not judged(broken * 1.01, broken, exact).ok  # the other entries still count
    row = judged(broken, exact.float(), exact)
    assert not row.ok
    assert row.ours == math.inf
    assert not row.doubtful


def test_integers_may_differ_in_one_of_a_hundred():
    theirs = torch.arange(1000)
    for count, ok in ((10, True), (11, False)):
        ours = theirs.clone()
        ours[:count] += 1
        assert judged(ours, theirs, theirs).ok is ok
    assert not judged(torch.tensor(2), torch.tensor(1), torch.tensor(1)).ok
    assert judged(theirs > 5, theirs > 5, theirs > 5).ok


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        (torch.zeros(2, 3), "shape torch.Size([2, 3]), the original's is torch.Size([3])"),
        (torch.zeros(3).half(), "dtype torch.float16, the original's is torch.float32"),
        (None, "None instead of a tensor"),
    ],
)
def test_another_kind_of_result(ours, note):
    zeros = torch.zeros(3)
    row = judged(ours, zeros, zeros.double())
    assert not row.ok
    assert row.note == note


def test_results_that_are_no_tensors():
    rows = compare(["n", "m"], [None, None], [3, 4], [3, 5], None, EPS)
    assert [row.ok for row in rows] == [True, False]
    assert rows[1].note == "4, the original gives 5"


def test_nothing_is_right():
    assert judged(torch.empty(0), torch.empty(0), torch.empty(0).double()).ok
    assert judged(torch.zeros(3), torch.zeros(3), torch.zeros(3).double()).ok
    complex_ = torch.randn(100, dtype=torch.complex128)
    assert judged(complex_.to(torch.complex64), complex_.to(torch.complex64), complex_).ok
    assert not judged(complex_.to(torch.complex64) * 1.01, complex_.cfloat(), complex_).ok


def test_the_error_survives_a_process_boundary():
    found = Verification([Comparison("x", 1.0, 0.1, 0.2)])
    with pytest.raises(BlaVerificationError, match="1 of 1 results less accurate") as caught:
        found.check()
    assert pickle.loads(pickle.dumps(caught.value)).verification == found
