"""Padding, concatenation and slicing.

A padded or joined tensor stays a leaf, but it remembers its pieces: a slice of a *product* with it
finds the piece again. That is how V padded with a column of ones gives numerator and normaliser
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bla_inductor.algebra.index import Index, Size, as_size, equal
from bla_inductor.algebra.registry import Lookup, Result, Unruled, number, rule
from bla_inductor.algebra.term import (
    Leaf,
    Origin,
    Part,
    Read,
    Term,
    Value,
    align,
    leaf_value,
    multiply,
)
from bla_inductor.algebra.tiles import sliced

__all__: list[str] = []

aten = torch.ops.aten
_END = 2**62  # a slice written without an end arrives with the largest int64


def _sliced(value: Value, dim: int, start: Size, end: Size, size: Size) -> Value | None:
    """`value[start:end]` along `dim`, where that is all of it, or one piece of a padded or joined
    leaf.
    """
    length = end - start
    if equal(length, size):
        return value
    axis = value.axes[dim]
    if len(axis) != 1:
        return None
    (index,) = axis
    readers = [f for f in value.term.factors if index in f.indices()]
    if not readers and index not in value.term.bound:
        new: tuple[Index, ...] = () if equal(length, 1) else (Index(length),)
        return Value(value.term, (*value.axes[:dim], new, *value.axes[dim + 1 :]), value.dtype)
    if len(readers) != 1 or not isinstance(read := readers[0], Read) or read.leaf.parts is None:
        return None
    at, parts = read.leaf.parts
    others = [i for j, a in enumerate(read.axes) if j != at for i in a]
    if read.axes[at] != (index,) or index in others or read.power != 1:
        return None
    offset: Size = 0
    for part in parts:
        if equal(offset, start) and equal(part.length, length) and part.value is not None:
            return _with_part(value, read, at, part.value, dim)
        offset = offset + part.length
    return None


def _with_part(value: Value, read: Read, at: int, part: Value, dim: int) -> Value:
    """`value` with one factor, a read of a joined leaf, narrowed to one of the pieces."""
    rank = len(value.axes)
    others = [j for j in range(len(read.axes)) if j != at]
    rest = tuple(f for f in value.term.factors if f is not read)
    term = replace(value.term, factors=rest)
    whole = Value(term, value.axes + tuple(read.axes[j] for j in others), value.dtype)
    whole, piece = align(whole, part.fresh(), {rank + k: j for k, j in enumerate(others)})
    if piece.dtype.itemsize > read.dtype.itemsize:
        piece = piece.cast(read.dtype)
    axes = (*whole.axes[:dim], piece.axes[at], *whole.axes[dim + 1 : rank])
    return Value(multiply(whole.term, piece.term), axes, value.dtype)


def _piece(value: Value, out: torch.Tensor, dim: int, start: Size) -> Value:
    """A leaf that remembers of what it is a slice."""
    shape = tuple(as_size(s) for s in out.shape)
    fixed = all(leaf.fixed for leaf in value.term.leaves())
    leaf = Leaf(shape, out.dtype, fixed, "slice")
    return leaf_value(sliced(leaf, value, dim, start, selected=out.dim() < len(value.axes)))


def _bound_at(at: Any, size: Size, default: Size) -> Size:
    if at is None:
        return default
    if isinstance(at, int) and at >= _END:
        return size
    position = as_size(at)
    if isinstance(position, int) and position < 0:
        return size + position
    if isinstance(position, int) and isinstance(size, int):
        return min(position, size)
    return position


@rule(aten.slice)
def _slice(
    V: Lookup,
    out: torch.Tensor,
    x: torch.Tensor,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Result:
    if step != 1:
        raise Unruled
    dim = dim % x.dim()
    size = as_size(x.shape[dim])
    first, last = _bound_at(start, size, 0), _bound_at(end, size, size)
    return _sliced(V(x), dim, first, last, size) or _piece(V(x), out, dim, first)


@rule(aten.select)
def _select(V: Lookup, out: torch.Tensor, x: torch.Tensor, dim: int, index: int) -> Result:
    return _entry(V(x), out, dim % x.dim(), index, as_size(x.shape[dim]))


@rule(aten.unbind)
def _unbind(V: Lookup, out: Any, x: torch.Tensor, dim: int = 0) -> Result:
    size = as_size(x.shape[dim])
    return [_entry(V(x), tensor, dim % x.dim(), i, size) for i, tensor in enumerate(out)]


def _entry(value: Value, out: torch.Tensor, dim: int, index: int, size: Size) -> Value:
    start = _bound_at(index, size, 0)
    found = _sliced(value, dim, start, start + 1, size)
    if found is None:
        return _piece(value, out, dim, start)
    return Value(found.term, found.axes[:dim] + found.axes[dim + 1 :], found.dtype)


@rule(aten.split, aten.split_with_sizes)
def _split(V: Lookup, out: Any, x: torch.Tensor, sizes: Any, dim: int = 0) -> Result:
    dim = dim % x.dim()
    size = as_size(x.shape[dim])
    pieces: list[Value | None] = []
    offset: Size = 0
    for tensor in out:
        length = as_size(tensor.shape[dim])
        piece = _sliced(V(x), dim, offset, offset + length, size)
        pieces.append(piece or _piece(V(x), tensor, dim, offset))
        offset = offset + length
    return pieces


def _joined(V: Lookup, out: torch.Tensor, dim: int, parts: list[Part]) -> Value:
    terms = [part.value.term for part in parts if part.value is not None]
    fixed = all(leaf.fixed for term in terms for leaf in term.leaves())
    shape = tuple(as_size(s) for s in out.shape)
    return leaf_value(Leaf(shape, out.dtype, fixed, "cat", parts=(dim, tuple(parts))))


@rule(aten.cat)
def _cat(V: Lookup, out: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int = 0) -> Result:
    dim = dim % out.dim()
    if any(t.dim() != out.dim() for t in tensors):
        raise Unruled  # the legacy empty tensor
    parts = [Part(V(t).cast(out.dtype), as_size(t.shape[dim])) for t in tensors]
    return _joined(V, out, dim, parts)


@rule(aten.cumsum)
def _cumsum(V: Lookup, out: torch.Tensor, x: torch.Tensor, dim: int, **_: Any) -> Result:
    """A running sum is a leaf whose last entry is the sum."""
    dim, value = dim % x.dim(), V(x)
    if not out.dtype.is_floating_point:
        raise Unruled
    total = value.term.summed(value.axes[dim], out.dtype)
    axes = (*value.axes[:dim], (), *value.axes[dim + 1 :])
    last = Part(Value(total, axes, out.dtype), 1)
    parts = [Part(None, as_size(x.shape[dim]) - 1), last]
    shape = tuple(as_size(s) for s in out.shape)
    fixed = value.term.fixed()
    leaf = Leaf(shape, out.dtype, fixed, "cumsum", parts=(dim, tuple(parts)))
    leaf.origin = Origin(aten.cumsum, (value, dim))
    return leaf_value(leaf)


@rule(aten.constant_pad_nd)
def _pad(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, pad: Sequence[Any], fill: Any = 0
) -> Result:
    rank = out.dim()
    widths = [as_size(p) for p in pad]
    padded = [i for i in range(0, len(widths), 2) if widths[i] != 0 or widths[i + 1] != 0]
    if not padded:
        return V(x)
    value = number(fill)
    if len(padded) != 1 or value is None:
        raise Unruled
    dim = rank - 1 - padded[0] // 2
    before, after = widths[padded[0]], widths[padded[0] + 1]

    def filled(length: Size) -> Part:
        shape = [as_size(s) for s in out.shape]
        shape[dim] = length
        axes = tuple(() if equal(s, 1) else (Index(s),) for s in shape)
        return Part(Value(Term(coef=value), axes, out.dtype), length)

    parts = [filled(before)] if before != 0 else []
    parts.append(Part(V(x), as_size(x.shape[dim])))
    parts += [filled(after)] if after != 0 else []
    return _joined(V, out, dim, parts)
