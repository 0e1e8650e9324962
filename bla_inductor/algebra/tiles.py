"""Sums of products over pieces that tile one axis are the product over all of it.

    Σ_{m<16} k[m,c]·v[m,d] + Σ_{16≤m<32} k[m,c]·v[m,d]  =  Σ_{m<32} k[m,c]·v[m,d]

A state that a loop over chunks of the keys adds up is the state. A piece is a slice, whose leaf
remembers of what it is one, or a single entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bla_inductor.algebra.index import Index, Size, axis_size, equal
from bla_inductor.algebra.term import Factor, Leaf, Origin, Read, Term, Value, align, multiply

__all__ = ["SLICE", "origin_of_written", "sliced", "summands", "tiled"]

aten = torch.ops.aten
SLICE = "slice"  # the operator of an origin, as `sliced` tells it
_MOST_PIECES = 256


def sliced(leaf: Leaf, value: Value, dim: int, start: Size, *, selected: bool = False) -> Leaf:
    """`leaf`, which is value[start:…] along `dim`; selected: value[start], without that axis."""
    kwargs = (("size", axis_size(value.axes[dim])), ("selected", selected))
    leaf.origin = Origin(SLICE, (value, dim, start), kwargs)
    return leaf


def tiled(a: Value, b: Value) -> Value | None:
    """a + b where their summands tile an axis."""
    added = [*summands(a), *summands(b)]
    slices = [_slices(value) for value in added]
    if len(added) > _MOST_PIECES or not all(slices):
        return None
    pieces = [own[0] for own in slices]
    end: Size = 0
    while (following := next((p for p in pieces if equal(p.start, end)), None)) is not None:
        pieces.remove(following)
        end = end + following.length
    if pieces or not equal(end, slices[0][0].size):
        return None
    first, *others = (_widened(value, own) for value, own in zip(added, slices, strict=True))
    if first is None or any(other is None or not _same(first, other) for other in others):
        return None
    return first


def summands(value: Value) -> Iterator[Value]:
    """What a chain of additions has added, in its order; `value` itself where there is none."""
    pending = [value]
    while pending:
        value = pending.pop()
        factors = value.term.factors
        read = factors[0] if len(factors) == 1 and value.term.coef == 1 else None
        whole = isinstance(read, Read) and read.axes == value.axes and read.power == 1
        origin = read.leaf.origin if whole and isinstance(read, Read) else None
        if origin is None or origin.operator is not aten.add or origin.kwargs:
            yield value
        elif len(origin.args) == 2 and all(isinstance(x, Value) for x in origin.args):
            pending += origin.args[::-1]
        else:
            yield value


@dataclass(frozen=True, slots=True)
class _Slice:
    """A read of a slice. index: which is summed, None where the slice has one entry."""

    read: Read
    index: Index | None
    start: Size
    size: Size

    @property
    def length(self) -> Size:
        return 1 if self.index is None else self.index.size

    @classmethod
    def of(cls, factor: Factor, term: Term) -> _Slice | None:
        origin = factor.leaf.origin if isinstance(factor, Read) and factor.power == 1 else None
        if origin is None or not isinstance(factor, Read) or origin.operator != SLICE:
            return None
        (whole, dim, start), known = origin.args, dict(origin.kwargs)
        axis = () if known["selected"] else factor.axes[dim]
        others = {
            i for at, a in enumerate(factor.axes) if known["selected"] or at != dim for i in a
        }
        if len(axis) > 1 or not set(axis) <= set(term.bound) - others or whole.term.bound:
            return None
        return cls(factor, axis[0] if axis else None, start, known["size"])


def _slices(value: Value) -> list[_Slice]:
    """The slices along one axis that `value` sums over."""
    found = [s for f in value.term.factors if (s := _Slice.of(f, value.term)) is not None]
    return [s for s in found if s.index is found[0].index] if value.term.bound else []


def _widened(value: Value, slices: list[_Slice]) -> Value | None:
    """`value`, which sums over slices, as a sum over what they are slices of."""
    term, (index, start, size) = value.term, (slices[0].index, slices[0].start, slices[0].size)
    if not all(equal(s.start, start) and equal(s.size, size) for s in slices):
        return None
    wide = Index(size)
    rest = tuple(f for f in term.factors if all(s.read is not f for s in slices))
    if index is None:
        term = replace(term, factors=rest, bound=(wide, *term.bound))
    elif any(index in f.indices() for f in rest):
        return None
    else:
        term = replace(term, factors=rest).substitute({index: (wide,)})
    value = replace(value, term=term)
    for piece in slices:
        value = _with_whole(value, piece, wide)
    return value


def _with_whole(value: Value, piece: _Slice, wide: Index) -> Value:
    """`value` times the tensor of which `piece` reads a slice, at `wide`."""
    assert piece.read.leaf.origin is not None
    whole, dim, _ = piece.read.leaf.origin.args
    axes = list(piece.read.axes)
    if len(axes) < len(whole.axes):
        axes.insert(dim, ())
    axes[dim] = (wide,)
    rank = len(value.axes)
    value = Value(value.term, (*value.axes, *axes), value.dtype)
    value, whole = align(value, whole.fresh(), {rank + i: i for i in range(len(axes))})
    if whole.dtype.itemsize > piece.read.dtype.itemsize:
        whole = whole.cast(piece.read.dtype)
    return Value(multiply(value.term, whole.term), value.axes[:rank], value.dtype)


def _same(a: Value, b: Value) -> bool:
    """Whether two sums are one, their factors in the same order."""
    if len(a.axes) != len(b.axes) or len(a.term.factors) != len(b.term.factors):
        return False
    a, b = align(a, b.fresh(), {i: i for i in range(len(a.axes))})
    named: dict[Index, Index] = {i: i for axis in a.axes for i in axis}
    for f, g in zip(a.term.factors, b.term.factors, strict=True):
        if not isinstance(f, Read) or not isinstance(g, Read) or f.leaf is not g.leaf:
            return False
        if (f.power, f.dtype) != (g.power, g.dtype) or len(f.axes) != len(g.axes):
            return False
        for x, y in zip(f.axes, g.axes, strict=True):
            if len(x) != len(y):
                return False
            if any(named.setdefault(j, i) is not i for i, j in zip(x, y, strict=True)):
                return False
    bound = {named.get(j) for j in b.term.bound}
    same = a.axes == b.axes and a.term.coef == b.term.coef and bound == set(a.term.bound)
    return same and a.term.precision == b.term.precision and a.term.depth == b.term.depth


def origin_of_written(origin: Origin) -> Origin | None:
    """The origin of what an in-place operator leaves where products are among its arguments:
    nothing is computed of it, but reasons are.
    """
    values = [a for a in origin.args if isinstance(a, Value)]
    if not any(v.term.bound for value in values for v in summands(value)):
        return None
    pure = {aten.add_: aten.add, aten.sub_: aten.sub}
    return replace(origin, operator=pure.get(origin.operator, origin.operator))
