"""Masks: what is selected rather than scaled, and the block patterns that a graph computes itself.

`masked_fill(z, m, 0)` and `where(m, z, 0)` of a product z multiply it by 0 or 1. Of anything else,
keys before they are contracted say, the masked tensor is a leaf as good as any. What a
condition is made of: conditions.py.

A mask that depends on no input is known exactly where it compares positions: `arange(h*d) // d`
against itself is δ(head, head'), whatever h and d are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bla_inductor.algebra.conditions import selection, single
from bla_inductor.algebra.index import (
    Axis,
    Index,
    as_size,
    axis_size,
    equal,
    product,
    quotient,
    reshape_axes,
)
from bla_inductor.algebra.registry import Lookup, Result, number, rule, scalar
from bla_inductor.algebra.signs import may_be_met
from bla_inductor.algebra.term import (
    Delta,
    Read,
    Term,
    Value,
    align,
    broadcast,
    guarded,
    multiply,
)
from bla_inductor.compat import clamp_is_flat_at_its_bounds

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.masked_fill)
def _masked_fill(V: Lookup, out: torch.Tensor, x: torch.Tensor, mask: Any, fill: Any) -> Result:
    filled = scalar(V, fill)
    if filled == 0:
        return _selected(V, out, x, mask, keep=False)
    return _bounded(V(x), V(mask), filled, out)


@rule(aten.index_put)
def _index_put(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, at: Any, fill: Any, accumulate: bool = False
) -> Result:
    """x[mask] = number."""
    (mask, *others) = at
    same = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == x.dim()
    return None if accumulate or others or not same else _masked_fill(V, out, x, mask, fill)


@rule(aten.where)
def _where(V: Lookup, out: torch.Tensor, condition: Any, x: Any = None, y: Any = None) -> Result:
    for one, other, keep in ((x, y, True), (y, x, False)):
        filled = scalar(V, other) if isinstance(one, torch.Tensor) else None
        if filled == 0:
            return _selected(V, out, one, condition, keep)
        if filled is not None:
            return _bounded(V(one), V(condition), filled, out, keep)
    return None


def _bounded(
    value: Value, condition: Value, low: Any, out: torch.Tensor, keep: bool = False
) -> Value | None:
    """max(z, low), said as low where z < low, else z; or, `keep`, as z where z > low, else low.

    At low itself the gradient is that of clamp: where a sum may be low, the program's has to be.
    """
    read = single(condition)
    origin = read.leaf.origin if isinstance(read, Read) and read.axes == condition.axes else None
    compares = (aten.gt, aten.ge) if keep else (aten.lt, aten.le)
    if origin is None or origin.operator not in compares or not value.term.bound:
        return None
    compared, limit = origin.args[0], number(origin.args[1])
    if not isinstance(compared, Value) or (compared.term, compared.axes) != (
        value.term,
        value.axes,
    ):
        return None
    if not isinstance(low, float) or not isinstance(limit, float):
        return None
    flat = origin.operator in (aten.gt, aten.le)
    if flat != clamp_is_flat_at_its_bounds() and may_be_met(low):
        return None
    if abs(limit - low) > torch.finfo(out.dtype).eps * abs(low):  # one may have been rounded
        return None
    return Value(guarded(value.term, "clamp", limit), value.axes, out.dtype)


def _selected(V: Lookup, out: torch.Tensor, x: torch.Tensor, mask: Any, keep: bool) -> Result:
    value, chosen = V(x), selection(V(mask), keep)
    if chosen is None:
        return None
    by_positions = all(isinstance(factor, Delta) for factor in chosen.term.factors)
    if not value.term.bound and not (value.term.constant() and by_positions):
        return None
    a, b, axes = broadcast(value, chosen)
    sizes = [axis_size(axis) for axis in axes]
    if len(sizes) != out.dim() or not all(map(equal, sizes, map(as_size, out.shape))):
        return None  # the zeros have a larger shape, and the result has it too
    return Value(multiply(a.term, b.term), axes, out.dtype)


@rule(aten.logical_not, aten.bitwise_not)
def _not(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    value = V(x)
    factor = single(value)
    if not isinstance(factor, Delta) or out.dtype != torch.bool:
        return None
    return Value(Term((replace(factor, keep=not factor.keep),)), value.axes, out.dtype)


@rule(aten.eye)
def _eye(V: Lookup, out: torch.Tensor, *_: Any, **__: Any) -> Result:
    rows, columns = (as_size(s) for s in out.shape)
    if not equal(rows, columns):
        return None
    i, j = _axis(rows), _axis(columns)
    return Value(Term((Delta(i, j),)), (i, j), out.dtype)


def _axis(size: Any) -> Axis:
    return () if equal(size, 1) else (Index(size),)


@rule(aten.block_diag)
def _block_diag(V: Lookup, out: torch.Tensor, blocks: Sequence[torch.Tensor]) -> Result:
    """Equal blocks of one number: δ(block, block')."""
    numbers = {scalar(V, x) for x in blocks}
    shapes = {tuple(map(as_size, x.shape)) for x in blocks}
    (shape, *others), number_ = [*shapes], numbers.pop()
    if numbers or number_ is None or others or len(shape) != 2:
        return None
    i, j = (_axis(len(blocks)) for _ in range(2))
    rows, columns = map(_axis, shape)
    return Value(Term((Delta(i, j),), (), number_), ((*i, *rows), (*j, *columns)), out.dtype)


def _compared(V: Lookup, out: torch.Tensor, x: Any, y: Any, keep: bool) -> Result:
    """Positions compared with positions, or a delta compared with zero."""
    if isinstance(x, torch.Tensor) and scalar(V, y) == 0:
        value = V(x)
        factor = single(value)
        if isinstance(factor, Delta):
            turned = replace(factor, keep=factor.keep is not keep)
            return Value(Term((turned,)), value.axes, out.dtype)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    a, b = _position(V(x)), _position(V(y))
    if a is None or b is None:
        return None
    rank = out.dim()
    a, b = (Value(p.term, ((),) * (rank + 1 - len(p.axes)) + p.axes, p.dtype) for p in (a, b))
    a, b = align(a, b.fresh(), {i: i for i in range(rank)})
    axes = tuple(i or j for i, j in zip(a.axes[:rank], b.axes[:rank], strict=True))
    return Value(Term((Delta(a.axes[rank], b.axes[rank], keep),)), axes, out.dtype)


@rule(aten.eq)
def _eq(V: Lookup, out: torch.Tensor, x: Any, y: Any) -> Result:
    return _compared(V, out, x, y, keep=True)


@rule(aten.ne)
def _ne(V: Lookup, out: torch.Tensor, x: Any, y: Any) -> Result:
    return _compared(V, out, x, y, keep=False)


def _position(value: Value) -> Value | None:
    """`value`, whose entries count through an axis from zero, with that axis after its own.

    That is arange, and arange divided by a length that divides its own, or the remainder of that.
    """
    read = single(value)
    if not isinstance(read, Read) or read.power != 1 or (origin := read.leaf.origin) is None:
        return None
    dtypes = {read.leaf.dtype, read.dtype, value.dtype}
    if not all(_counts_exactly(read, dtype) for dtype in dtypes):
        return None
    if origin.operator is aten.arange:
        first = [number(x) for x in origin.args]
        counts = len(first) == 1 or (len(first) > 1 and first[0] == 0 and first[2:] in ([], [1]))
        return Value(value.term, (*value.axes, read.axes[0]), value.dtype) if counts else None
    quotients = aten.floor_divide, aten.div
    if origin.operator not in (*quotients, aten.remainder):
        return None
    rounding = dict(origin.kwargs).get("rounding_mode")
    if origin.operator is aten.div and rounding not in ("floor", "trunc"):
        return None
    inner = _position(origin.args[0]) if isinstance(origin.args[0], Value) else None
    divisor = origin.args[1]
    if isinstance(divisor, Value):
        term = divisor.term
        divisor = term.coef if not term.factors and not term.bound else None
    if inner is None or divisor is None or int(divisor) != divisor:
        return None
    inner, size = inner.fresh(), as_size(divisor)
    count = quotient(axis_size(inner.axes[-1]), size)
    if count is None:
        return None
    (major, minor), split = reshape_axes((inner.axes[-1],), (count, size))
    counted = major if origin.operator in quotients else minor
    inner = inner.substitute(split)
    inner = Value(inner.term, (*inner.axes[:-1], counted), inner.dtype)
    rank = len(value.axes)
    whole = Value(value.term, (*value.axes, *read.axes), value.dtype)
    whole, inner = align(whole, inner, {rank + i: i for i in range(len(read.axes))})
    return Value(whole.term, (*whole.axes[:rank], inner.axes[-1]), value.dtype)


def _counts_exactly(read: Read, dtype: torch.dtype) -> bool:
    """Whether `dtype` has all whole numbers up to the length of what is counted through."""
    if dtype.is_floating_point:
        limit = int(2 / torch.finfo(dtype).eps)
    else:
        limit = torch.iinfo(dtype).max
    size = product(read.leaf.shape)
    return size <= limit if isinstance(size, int) else limit >= 2**24
