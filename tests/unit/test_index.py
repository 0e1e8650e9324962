"""Axes as tuples of indices: refinement, reshaping, sizes that may be symbolic."""

import itertools

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bla_inductor.algebra.index import (
    Index,
    Inexpressible,
    as_size,
    axis_size,
    equal,
    product,
    quotient,
    refine,
    reshape_axes,
    substitute_axes,
)

s0, s1 = sympy.symbols("s0 s1", integer=True, positive=True)


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        (12, 4, 3),
        (12, 5, None),
        (8 * s0, s0, 8),
        (8 * s0, 8, s0),
        (8 * s0, 3, None),
        (s0 * s1, s1, s0),
        (s0, s1, None),
        (2 * s0 + 4, 2, s0 + 2),
        (3 * s0 + 2, 2, None),
        (s0**2, s0, s0),
        (0, 4, None),
        (4, 0, None),
    ],
)
def test_quotient_is_exact_or_none(a, b, ratio) -> None:
    assert quotient(a, b) == ratio


def test_equal_knows_only_what_is_certain() -> None:
    assert equal(s0 * (s1 + 1), s0 * s1 + s0)
    assert not equal(s0, s1)
    assert not equal(s0, 4)


def test_refine_splits_both_sides() -> None:
    a, b, c = Index(4), Index(6), Index(2)
    d = Index(12)
    to_left, to_right = refine((a, b), (c, d))
    left = substitute_axes(((a, b),), to_left)[0]
    right = substitute_axes(((c, d),), to_right)[0]
    assert left == right
    assert [i.size for i in left] == [2, 2, 6]


def test_sizes_are_told_anew_when_torch_learns_that_they_are_equal() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    one, other = (
        mode.from_tensor(torch.empty(size), source=ConstantSource(f"x{size}"), static_shapes=False)
        for size in (12, 18)
    )
    a, b = one.shape[0] // 4, other.shape[0] // 6
    assert as_size(a) != as_size(b)
    assert not equal(as_size(a), as_size(b))
    assert a == b  # which is a guard
    assert as_size(a) == as_size(b)


def test_refine_keeps_equal_indices_of_the_left() -> None:
    a, b = Index(s0), Index(8)
    to_left, to_right = refine((a, b), (Index(8 * s0),))
    assert to_left == {}
    assert list(to_right.values()) == [(a, b)]


def test_uneven_split_is_inexpressible() -> None:
    with pytest.raises(Inexpressible, match="do not split evenly"):
        refine((Index(4), Index(6)), (Index(6), Index(4)))
    with pytest.raises(Inexpressible):
        reshape_axes(((Index(4),), (Index(6),)), [6, 4])


def test_reshape_with_symbols() -> None:
    batch, channels = Index(s0), Index(3 * s1)
    axes, split = reshape_axes(((batch,), (channels,)), [s0, 3, s1])
    assert axes[0] == (batch,)
    assert axes[1:] == tuple((i,) for i in split[channels])
    assert [i.size for i in split[channels]] == [3, s1]


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(SIZES, st.data())
def test_reshape_merges_and_splits_like_row_major_memory(sizes, data) -> None:
    """Any merge of neighbours and its inverse give the same indices back, in the same order."""
    indices = tuple(Index(s) for s in sizes if s > 1)
    axes = tuple((i,) for i in indices)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(indices)), max_size=3)) | {0, len(indices)})
    groups = [indices[a:b] for a, b in itertools.pairwise(cuts)] or [()]
    merged, split = reshape_axes(axes, [axis_size(g) for g in groups])
    assert not split
    assert merged == tuple(groups)
    back, split = reshape_axes(merged, [i.size for i in indices])
    assert not split
    assert back == axes


@given(st.permutations([2, 3, 4]), st.permutations([2, 3, 4]))
def test_refinements_agree_or_are_refused(left, right) -> None:
    a, b = tuple(map(Index, left)), tuple(map(Index, right))
    try:
        to_a, to_b = refine(a, b)
    except Inexpressible:
        assert left != right
        return
    (fine_a,), (fine_b,) = substitute_axes((a,), to_a), substitute_axes((b,), to_b)
    assert fine_a == fine_b
    assert product(i.size for i in fine_a) == 24
