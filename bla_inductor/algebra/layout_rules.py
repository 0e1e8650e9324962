"""Layout operators: the same numbers under other axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bla_inductor.algebra.index import Index, as_size, equal, reshape_axes
from bla_inductor.algebra.registry import Lookup, Result, Unruled, rule
from bla_inductor.algebra.term import Value

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.clone, aten.alias, aten.lift_fresh_copy, aten._to_copy, aten.contiguous, layout=True)
def _same(V: Lookup, out: torch.Tensor, x: torch.Tensor, **_: Any) -> Result:
    value = V(x)
    return value if value.dtype == out.dtype else value.cast(out.dtype)


@rule(aten.detach, layout=True)
def _detach(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    """A constant stays one; anything else is a leaf, or gradients would flow where the user cut
    them.
    """
    value = V(x)
    return None if value.term.factors else value


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
