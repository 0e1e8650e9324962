"""Layout operators: the same numbers under other axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bla_inductor.algebra.index import Index, as_size, axis_size, equal, refine, reshape_axes
from bla_inductor.algebra.registry import Lookup, Result, Unruled, rule, scalar
from bla_inductor.algebra.term import Value, constant

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.clone, aten.alias, aten.lift_fresh_copy, aten._to_copy, aten.contiguous, layout=True)
def _same(V: Lookup, out: torch.Tensor, x: torch.Tensor, **_: Any) -> Result:
    value = V(x)
    written = scalar(V, x) if value.term.factors and not x.dim() else None
    if written is not None:
        return constant(written, out)
    if value.term.factors and x.device != out.device:
        return None  # an operator reads tensors of one device
    if value.dtype == out.dtype:
        return value
    if not _keeps(value, x.dtype, out.dtype):
        return None
    return value.cast(out.dtype)


def _keeps(value: Value, before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast changes nothing but precision: to integers it truncates, from complex numbers
    it drops a part.
    """
    if before.is_complex or after.is_complex:
        return before.is_complex and after.is_complex
    if after.is_floating_point or before == torch.bool:
        return True
    zero_or_one = value.term.constant() and value.term.coef in (0, 1)
    return zero_or_one or (not before.is_floating_point and after == torch.int64)


@rule(aten.detach, layout=True)
def _detach(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    """What has no gradient stays what it is; anything else is a leaf, or gradients would flow where
    the user cut them.
    """
    value = V(x)
    differentiable = out.dtype.is_floating_point or out.dtype.is_complex
    return None if differentiable and not value.term.constant() else value


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, layout=True)
def _view(V: Lookup, out: torch.Tensor, x: torch.Tensor, *_: Any) -> Result:
    if x.dtype != out.dtype:
        raise Unruled  # view(dtype) reinterprets bits
    value = V(x)
    axes, split = reshape_axes(value.axes, [as_size(s) for s in out.shape])
    return Value(value.term.substitute(split), axes, value.dtype)


def _permuted(value: Value, order: Sequence[int]) -> Value:
    rank = len(value.axes)
    return Value(value.term, tuple(value.axes[i % rank] for i in order), value.dtype)


@rule(aten.permute, layout=True)
def _permute(V: Lookup, out: torch.Tensor, x: torch.Tensor, order: Sequence[int]) -> Result:
    return _permuted(V(x), order)


@rule(aten.transpose, aten.t, layout=True)
def _transpose(V: Lookup, out: torch.Tensor, x: torch.Tensor, i: int = -2, j: int = -1) -> Result:
    rank = x.dim()
    if rank < 2:
        return V(x)
    order = list(range(rank))
    order[i % rank], order[j % rank] = order[j % rank], order[i % rank]
    return _permuted(V(x), order)


@rule(aten.diagonal)
def _diagonal(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, offset: int = 0, i: int = 0, j: int = 1
) -> Result:
    value, rank = V(x).fresh(), x.dim()
    a, b = value.axes[i % rank], value.axes[j % rank]
    if offset != 0 or not equal(axis_size(a), axis_size(b)) or set(a) & set(b):
        raise Unruled
    to_a, to_b = refine(a, b)
    value = value.substitute(to_a).substitute(to_b)
    rest = tuple(v for d, v in enumerate(value.axes) if d not in (i % rank, j % rank))
    return Value(value.term, (*rest, value.axes[i % rank]), value.dtype)


@rule(aten.unsqueeze, layout=True)
def _unsqueeze(V: Lookup, out: torch.Tensor, x: torch.Tensor, dim: int) -> Result:
    value, at = V(x), dim % out.dim()
    return Value(value.term, (*value.axes[:at], (), *value.axes[at:]), value.dtype)


@rule(aten.squeeze, layout=True)
def _squeeze(V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any = None) -> Result:
    value, rank = V(x), x.dim()
    chosen = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in chosen if not value.axes[d % rank]} if rank else set()
    axes = tuple(axis for i, axis in enumerate(value.axes) if i not in gone)
    if len(axes) != out.dim():
        raise Unruled  # a symbolic axis that was specialised to one
    return Value(value.term, axes, value.dtype)


@rule(aten.repeat, layout=True)
def _repeat(V: Lookup, out: torch.Tensor, x: torch.Tensor, counts: Sequence[Any]) -> Result:
    """Every axis so many times, one after the other: a new, major index of it."""
    value = V(x)
    axes = ((),) * (out.dim() - x.dim()) + value.axes
    sizes = [as_size(count) for count in counts]
    tiled = tuple(
        axis if equal(size, 1) else (Index(size), *axis)
        for axis, size in zip(axes, sizes, strict=True)
    )
    return Value(value.term, tiled, value.dtype)


@rule(aten.expand, layout=True)
def _expand(V: Lookup, out: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> Result:
    value = V(x)
    axes = ((),) * (out.dim() - x.dim()) + value.axes
    sizes = [as_size(s) for s in out.shape]
    grown = tuple(
        axis or (() if equal(size, 1) else (Index(size),))
        for axis, size in zip(axes, sizes, strict=True)
    )
    return Value(value.term, grown, value.dtype)


@rule(aten.copy)
def _copied(V: Lookup, out: torch.Tensor, x: torch.Tensor, source: torch.Tensor, *_: Any) -> Result:
    """All of x is written over."""
    value = _expand(V, out, source)
    if not isinstance(value, Value) or source.device != out.device:
        return None
    same = value.dtype == out.dtype
    return value.cast(out.dtype) if same or _keeps(value, source.dtype, out.dtype) else None
