"""Which tensor of the graph is this product of factors?

A match speaks of factors; the rewrite needs nodes. One factor is its leaf. For several (keys times
a mask) the catalogue knows whether the user's graph already holds their product, so that nothing is
computed twice.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from bla_inductor.algebra import (
    Axes,
    Axis,
    Delta,
    Factor,
    Guard,
    Index,
    Mask,
    Observation,
    Read,
    Size,
    Term,
    apart,
    axis_size,
    equal,
)
from bla_inductor.algebra.index import substitute_axes
from bla_inductor.emit import Unemittable, grouped

if TYPE_CHECKING:
    from bla_inductor.patterns.feature_maps import FeatureMap

__all__ = ["Catalogue", "Operand", "Piece", "Source", "contracted_dtype"]

_MOST_FACTORS = 5


@dataclass(frozen=True, slots=True)
class Source:
    """`coef` times the tensor of `node`, laid out as `axes`, is the product; dtype as it was
    contracted.
    """

    node: fx.Node
    axes: Axes
    coef: Any
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """One factor as a step of a product: multiply by the tensor, divide by it, or keep what was
    there where it is true ("where"), or where it is not ("unless"), and zero elsewhere.

    born: since when the tensor holds the value that is meant; -1 for a product of the user's.
    """

    source: Source
    how: Literal["times", "over", "where", "unless"]
    born: int

    @property
    def coef(self) -> Any:
        """How many times the factor the step multiplies by."""
        return 1 / self.source.coef if self.how == "over" else self.source.coef


def contracted_dtype(factors: Sequence[Factor], kept: torch.dtype | None) -> torch.dtype:
    """What a product of factors has to be passed in to lose nothing that the user kept.

    A factor by itself is as wide as it was read. A product of two is rounded to what the sum over
    it was kept in (`kept`), unless the factors are wider themselves.
    """
    reads = [f for f in factors if isinstance(f, Read)]
    floats = [r.dtype for r in reads if r.dtype.is_floating_point]
    common = reduce(torch.promote_types, floats or [r.dtype for r in reads])
    rounded = len(floats) + sum(isinstance(f, Guard) for f in factors) > 1
    return kept if rounded and kept is not None and kept.itemsize > common.itemsize else common


@dataclass(frozen=True, slots=True)
class Operand:
    """A product of factors as (*batch, rows, columns) of the operator.

    source: the tensor of the graph that the product is; where there is none, `pieces` make it.
    map: where the operator reads `source` and makes the product of it by itself.
    kept: the dtype that the sum over the product was kept in.
    """

    factors: tuple[Factor, ...]
    source: Source | None
    rows: tuple[Index, ...]
    columns: tuple[Index, ...]
    map: FeatureMap | None = None
    pieces: tuple[Piece, ...] = ()
    kept: torch.dtype | None = None

    @property
    def reads(self) -> list[Read]:
        return [f for f in self.factors if isinstance(f, Read)]

    @property
    def dtype(self) -> torch.dtype:
        if self.source is not None:
            return self.source.dtype
        return contracted_dtype(self.factors, self.kept)

    @property
    def coef(self) -> Any:
        if self.source is not None:
            return self.source.coef
        return prod(piece.coef for piece in self.pieces)

    @property
    def nodes(self) -> list[tuple[fx.Node, int]]:
        """The nodes that are read, with each leaf's birth, or -1 for a product of the user's."""
        if self.source is not None and self.map is not None:
            return [(self.source.node, self.map.leaf.born)]
        if self.source is not None:
            born = self.reads[0].leaf.born if len(self.reads) == len(self.factors) == 1 else -1
            return [(self.source.node, born)]
        if self.pieces:
            return [(p.source.node, p.born) for p in self.pieces]
        return [(r.leaf.node, r.leaf.born) for r in self.reads if r.leaf.node is not None]

    def order(self, indices: Sequence[Index]) -> Axis:
        """`indices` in the order in which the operand has them in memory, nearly always."""
        axes = self.source.axes if self.source is not None else self.reads[0].axes
        return grouped([i for axis in axes for i in axis], {"": indices})[""]


class Catalogue:
    """The plain products among the tensors of an observed graph, and what they are divided by."""

    def __init__(self, seen: Observation) -> None:
        self._products: dict[tuple[int, ...], list[tuple[fx.Node, Term]]] = defaultdict(list)
        self._seen = seen
        for node, value in seen.values.items():
            self._add(node, apart(value.term))
            if value.term.bound:  # as a divisor, a sum is a guard that guards against nothing
                self._add(node, Term((Guard(value.term, "add", 0.0),)))

    def _add(self, node: fx.Node, term: Term) -> None:
        if not term.bound:
            plain = len(term.factors) == 1 and isinstance(term.factors[0], Read)
            if term.factors and not plain and len(term.factors) <= _MOST_FACTORS:
                self._products[_key(term.factors)].append((node, term))

    def find(
        self, factors: Sequence[Factor], before: fx.Node, kept: torch.dtype | None = None
    ) -> Source | None:
        """The tensor, made before `before`, that is the product of `factors` but for a number.

        kept: the dtype that the sum over the product was kept in.
        """
        limit = self._seen.position[before]
        if len(factors) == 1 and isinstance(read := factors[0], Read) and read.power == 1:
            node = read.leaf.node
            return None if node is None else Source(node, read.axes, 1.0, read.dtype)
        for node, term in self._products.get(_key(factors), ()):
            value = self._seen.values[node]
            if self._seen.position[node] >= limit:
                continue
            mapping = _unify(term.factors, factors, {})
            if mapping is None:
                continue
            dtype = value.dtype
            if any(isinstance(f, Read) for f in factors):
                wanted = contracted_dtype(factors, kept)
                if wanted.itemsize > value.dtype.itemsize and wanted != kept:
                    continue  # the same product, made of narrower factors
                dtype = min(value.dtype, wanted, key=lambda d: d.itemsize)
            return Source(node, substitute_axes(value.axes, mapping), term.coef, dtype)
        return None

    def piece(self, factor: Factor, before: fx.Node) -> Piece:
        """A factor of its own, as it stands in the graph."""
        if isinstance(factor, Guard):
            return self._divided(factor, before)
        assert not isinstance(factor, Delta)  # no family matches one that is left over
        node = factor.leaf.node
        assert node is not None  # every leaf of a node's Value is the result of a node
        if isinstance(factor, Mask):
            source = Source(node, factor.axes, 1.0, torch.bool)
            return Piece(source, "where" if factor.keep else "unless", factor.leaf.born)
        source = Source(node, factor.axes, 1.0, factor.dtype)
        return Piece(source, "times" if factor.power == 1 else "over", factor.leaf.born)

    def _divided(self, guard: Guard, before: fx.Node) -> Piece:
        for factor, how in ((guard, "times"), (replace(guard, power=-guard.power), "over")):
            source = self.find((factor,), before)
            if source is not None:
                return Piece(source, how, -1)  # type: ignore[arg-type]
        raise Unemittable("a divisor inside one operator cannot be separated from it")


def _key(factors: Sequence[Factor]) -> tuple[int, ...]:
    return tuple(sorted(id(leaf) for f in factors for leaf in f.leaves()))


def _unify(
    have: Sequence[Factor], want: Sequence[Factor], mapping: dict[Index, Axis]
) -> dict[Index, Axis] | None:
    """What the indices of `have` are in those of `want`, so that the products are the same."""
    if len(have) != len(want):
        return None
    for order in itertools.permutations(want):
        found: dict[Index, Axis] | None = dict(mapping)
        for a, b in zip(have, order, strict=True):
            found = _unify_factor(a, b, found) if found is not None else None
        if found is not None:
            return found
    return None


def _unify_factor(a: Factor, b: Factor, mapping: dict[Index, Axis]) -> dict[Index, Axis] | None:
    if isinstance(a, Guard) and isinstance(b, Guard):
        if (a.kind, a.eps, a.power, a.term.coef) != (b.kind, b.eps, b.power, b.term.coef):
            return None
        found = _unify(a.term.factors, b.term.factors, mapping)
        summed = {j for i in a.term.bound for j in (found or {}).get(i, ())}
        return found if found is not None and summed == set(b.term.bound) else None
    if isinstance(a, Read) and isinstance(b, Read):
        same = a.leaf is b.leaf and a.power == b.power and not _narrower(a.dtype, b.dtype)
    elif isinstance(a, Mask) and isinstance(b, Mask):
        same = a.leaf is b.leaf and a.keep == b.keep
    else:
        return None
    found = mapping if same else None
    for x, y in zip(a.axes, b.axes, strict=False):
        found = _unify_axis(x, y, found) if found is not None else None
    return found


def _narrower(a: torch.dtype, b: torch.dtype) -> bool:
    return a.is_floating_point and b.is_floating_point and a.itemsize < b.itemsize


def _unify_axis(have: Axis, want: Axis, mapping: dict[Index, Axis]) -> dict[Index, Axis] | None:
    """`want` may be finer than `have`: each index of `have` takes as many of `want` as fill its
    size.
    """
    mapping, rest = dict(mapping), list(want)
    for index in have:
        taken: list[Index] = []
        size: Size = 1
        while not equal(size, index.size):
            if not rest:
                return None
            taken.append(rest.pop(0))
            size = axis_size(tuple(taken))
        if mapping.setdefault(index, tuple(taken)) != tuple(taken):
            return None
    return None if rest else mapping
