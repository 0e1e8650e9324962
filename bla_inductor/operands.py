"""Which tensor of the graph is this product of factors?

A match speaks of factors; the rewrite needs nodes. One factor is its leaf. For several (keys times
a mask) the catalogue knows whether the user's graph already holds their product, so that nothing is
computed twice.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bla_inductor.algebra import (
    Axes,
    Axis,
    Factor,
    Guard,
    Index,
    Observation,
    Read,
    Size,
    axis_size,
    equal,
)
from bla_inductor.algebra.index import substitute_axes
from bla_inductor.emit import Unemittable, grouped

if TYPE_CHECKING:
    from bla_inductor.patterns.feature_maps import FeatureMap

__all__ = ["Catalogue", "Operand", "Source", "source_of"]

_MOST_FACTORS = 5


@dataclass(frozen=True, slots=True)
class Source:
    """`coef` times the tensor of `node`, laid out as `axes`, is the product; dtype as it was
    contracted.
    """

    node: fx.Node
    axes: Axes
    coef: object
    dtype: torch.dtype


def source_of(read: Read) -> Source:
    """A factor of its own as it stands in the graph."""
    if read.leaf.node is None:
        raise Unemittable("a factor inside one operator cannot be separated from it")
    return Source(read.leaf.node, read.axes, 1.0, read.dtype)


@dataclass(frozen=True, slots=True)
class Operand:
    """A product of factors as (*batch, rows, columns) of the operator.

    map: where the operator reads `source` and makes the product of it by itself.
    """

    factors: tuple[Factor, ...]
    source: Source | None
    rows: tuple[Index, ...]
    columns: tuple[Index, ...]
    map: FeatureMap | None = None

    @property
    def reads(self) -> list[Read]:
        return [f for f in self.factors if isinstance(f, Read)]

    @property
    def dtype(self) -> torch.dtype:
        if self.source is not None:
            return self.source.dtype
        return min((r.dtype for r in self.reads), key=lambda d: d.itemsize)

    @property
    def coef(self) -> Any:
        return 1.0 if self.source is None else self.source.coef

    @property
    def nodes(self) -> list[tuple[fx.Node, int]]:
        """The nodes that are read, with each leaf's birth, or -1 for a product of the user's."""
        if self.source is not None and self.map is not None:
            return [(self.source.node, self.map.leaf.born)]
        if self.source is not None:
            born = self.reads[0].leaf.born if len(self.reads) == len(self.factors) == 1 else -1
            return [(self.source.node, born)]
        return [(r.leaf.node, r.leaf.born) for r in self.reads if r.leaf.node is not None]

    def order(self, indices: Sequence[Index]) -> Axis:
        """`indices` in the order in which the operand has them in memory, nearly always."""
        axes = self.source.axes if self.source is not None else self.reads[0].axes
        return grouped([i for axis in axes for i in axis], {"": indices})[""]


class Catalogue:
    """The plain products among the tensors of an observed graph."""

    def __init__(self, seen: Observation) -> None:
        self._products: dict[tuple[int, ...], list[fx.Node]] = defaultdict(list)
        self._seen = seen
        for node, value in seen.values.items():
            factors = value.term.factors
            plain = len(factors) == 1 and isinstance(factors[0], Read)
            if not value.term.bound and not plain and len(factors) <= _MOST_FACTORS:
                self._products[_key(value.term.factors)].append(node)

    def find(self, factors: Sequence[Factor], before: fx.Node) -> Source | None:
        """The tensor, made before `before`, that is the product of `factors` but for a number."""
        limit = self._seen.position[before]
        if len(factors) == 1 and isinstance(read := factors[0], Read) and read.power == 1:
            node = read.leaf.node
            return None if node is None else Source(node, read.axes, 1.0, read.dtype)
        for node in self._products.get(_key(factors), ()):
            if self._seen.position[node] >= limit:
                continue
            value = self._seen.values[node]
            mapping = _unify(value.term.factors, factors, {})
            if mapping is not None:
                dtype = min(
                    (value.dtype, *(f.dtype for f in factors if isinstance(f, Read))),
                    key=lambda d: d.itemsize if d.is_floating_point else 8,
                )
                return Source(node, substitute_axes(value.axes, mapping), value.term.coef, dtype)
        return None


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
    if isinstance(a, Read) and isinstance(b, Read):
        if a.leaf is not b.leaf or a.power != b.power:
            return None
        found: dict[Index, Axis] | None = mapping
        for x, y in zip(a.axes, b.axes, strict=True):
            found = _unify_axis(x, y, found) if found is not None else None
        return found
    if isinstance(a, Guard) and isinstance(b, Guard):
        same = (a.kind, a.eps, a.power, a.term.coef) == (b.kind, b.eps, b.power, b.term.coef)
        return _unify(a.term.factors, b.term.factors, mapping) if same else None
    return None


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
