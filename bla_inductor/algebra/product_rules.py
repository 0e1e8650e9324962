"""Products, contractions, reductions and divisions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from bla_inductor.algebra.apart import apart
from bla_inductor.algebra.deltas import resolved
from bla_inductor.algebra.registry import Lookup, Result, Unruled, number, rule, scalar
from bla_inductor.algebra.term import (
    Delta,
    Term,
    Value,
    align,
    broadcast,
    constant,
    multiply,
    reciprocal,
)

__all__ = ["bmm", "contract", "contracted", "div", "mm", "mul", "mv", "operand", "reduced"]

aten = torch.ops.aten


@rule(aten.ones, aten.ones_like, aten.new_ones)
def _ones(V: Lookup, out: torch.Tensor, *_: Any, **__: Any) -> Result:
    return constant(1.0, out)


@rule(aten.zeros, aten.zeros_like, aten.new_zeros)
def _zeros(V: Lookup, out: torch.Tensor, *_: Any, **__: Any) -> Result:
    return constant(0.0, out)


@rule(aten.full, aten.full_like, aten.new_full)
def _full(V: Lookup, out: torch.Tensor, like: Any, *rest: Any, **_: Any) -> Result:
    fill = number(rest[-1])
    return None if fill is None else constant(fill, out)


@rule(aten.fill)
def _fill(V: Lookup, out: torch.Tensor, x: torch.Tensor, value: Any) -> Result:
    fill = scalar(V, value)
    return None if fill is None else constant(fill, out)


@rule(aten.scalar_tensor)
def _scalar_tensor(V: Lookup, out: torch.Tensor, x: Any, **_: Any) -> Result:
    fill = number(x)
    return None if fill is None else constant(fill, out)


# Products and contractions.


def operand(V: Lookup, x: torch.Tensor, summed: Iterable[int]) -> Value:
    """An operand of a contraction over the dims `summed`. A chain of three is as long as attention
    gets: a longer one starts anew. A sum over one entry (q·k times 1 / z, as matrices) is none.
    """
    value = V(x)
    if value.term.depth < 2 or not any(value.axes[dim] for dim in summed):
        return value
    return V.cut(x)


def contracted(
    a: Value, b: Value, batch: dict[int, int], summed: dict[int, int], dtype: torch.dtype
) -> Value | None:
    """Σ over the `summed` pairs of axes of a·b; a product with parameters is a projection, so a
    leaf.
    """
    if a.term.fixed() or b.term.fixed():
        return None
    a, b = align(a, b.fresh(), batch | summed)
    bound = tuple(i for axis in summed for i in (a.axes[axis] or b.axes[summed[axis]]))
    term = multiply(a.term, b.term).summed(bound, dtype)
    axes = [a.axes[i] or b.axes[batch[i]] for i in batch]
    axes += [axis for i, axis in enumerate(a.axes) if i not in batch and i not in summed]
    taken = {*batch.values(), *summed.values()}
    axes += [axis for j, axis in enumerate(b.axes) if j not in taken]
    return resolved(Value(term, tuple(axes), dtype))


def contract(
    V: Lookup,
    x: torch.Tensor,
    y: torch.Tensor,
    batch: dict[int, int],
    summed: dict[int, int],
    out: torch.Tensor,
) -> Result:
    a, b = operand(V, x, summed), operand(V, y, summed.values())
    return contracted(a, b, batch, summed, out.dtype)


@rule(aten.bmm)
def bmm(
    V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any
) -> Result:
    return contract(V, a, b, {0: 0}, {2: 1}, out)


@rule(aten.mm)
def mm(
    V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any
) -> Result:
    return contract(V, a, b, {}, {1: 0}, out)


@rule(aten.mv)
def mv(V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
    return contract(V, a, b, {}, {1: 0}, out)


@rule(aten.dot)
def _dot(V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
    return contract(V, a, b, {}, {0: 0}, out)


@rule(aten.mul)
def mul(V: Lookup, out: torch.Tensor, x: Any, y: Any) -> Result:
    for one, other in ((x, y), (y, x)):
        factor = number(other)
        if factor is not None:
            value = V(one)
            return Value(value.term.scaled(factor), value.axes, out.dtype)
    a, b = V(x), V(y)
    # A parameter times something not contracted yet is part of a feature map: the product is the
    # leaf.
    if (a.term.fixed() and not b.term.bound) or (b.term.fixed() and not a.term.bound):
        return None
    for one, other in ((a.term, b.term), (b.term, a.term)):
        if any(isinstance(f, Delta) for f in one.factors) and not (other.bound or other.constant()):
            return None  # the diagonal of what is not contracted yet: no operand is that
    a, b, axes = broadcast(a, b)
    return Value(multiply(_settled(a.term), _settled(b.term)), axes, out.dtype)


def _settled(term: Term) -> Term:
    """`term` as a factor: a sum that is a tensor of its own is no contraction of the product."""
    alone = term.bound and not apart(term).bound
    return replace(term, depth=0, precision=None) if alone else term


@rule(aten.div)
def div(V: Lookup, out: torch.Tensor, x: Any, y: Any, *, rounding_mode: Any = None) -> Result:
    if rounding_mode is not None:
        raise Unruled
    factor = number(y)
    value = V(x) if isinstance(x, torch.Tensor) else None
    if factor is not None and value is not None:
        if factor == 0 or abs(1 / factor) == math.inf:
            return None
        return Value(value.term.scaled(1 / factor), value.axes, out.dtype)
    divisor = V(y)
    if value is None:
        factor = number(x)
        return None if factor is None else _inverted(divisor, out, factor)
    if (value.term.fixed() or divisor.term.fixed()) and not value.term.bound:
        return None
    a, b, axes = broadcast(value, divisor)
    return Value(multiply(a.term, _reciprocal(b.term)), axes, out.dtype)


@rule(aten.reciprocal)
def _reciprocal_rule(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    return _inverted(V(x), out, 1.0)


def _inverted(value: Value, out: torch.Tensor, factor: Any) -> Value:
    return Value(_reciprocal(value.term).scaled(factor), value.axes, out.dtype)


def _reciprocal(term: Term) -> Term:
    if term.coef == 0:
        raise Unruled
    return reciprocal(term)


@rule(aten.pow)
def _pow(V: Lookup, out: torch.Tensor, x: Any, exponent: Any) -> Result:
    """Only z**-1, which is a reciprocal in other words."""
    if number(exponent) != -1 or not isinstance(x, torch.Tensor):
        return None
    return _inverted(V(x), out, 1.0)


@rule(aten.neg)
def _neg(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    value = V(x)
    return Value(value.term.scaled(-1.0), value.axes, out.dtype)


def reduced(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any, keepdim: bool, mean: bool
) -> Result:
    value, rank = V(x), x.dim()
    if not out.dtype.is_floating_point:
        raise Unruled
    chosen = (
        {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
        if rank
        else set()
    )
    bound = tuple(i for d in sorted(chosen) for i in value.axes[d])
    term = value.term.summed(bound, out.dtype)
    # a sum of a product is no further product: Σ_g Σ_m k·v is as deep as Σ_m k·v
    term = replace(term, depth=max(value.term.depth, 1))
    if mean:
        for index in bound:
            term = term.scaled(1 / index.size)
    axes = tuple(
        () if d in chosen else axis
        for d, axis in enumerate(value.axes)
        if keepdim or d not in chosen
    )
    return resolved(Value(term, axes, out.dtype))


@rule(aten.sum)
def _sum(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any = None, keepdim: bool = False, **_: Any
) -> Result:
    return reduced(V, out, x, dims, keepdim, mean=False)


@rule(aten.mean)
def _mean(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any = None, keepdim: bool = False, **_: Any
) -> Result:
    return reduced(V, out, x, dims, keepdim, mean=True)
