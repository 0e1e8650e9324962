"""Products, contractions, reductions, divisions, and the guard of a normaliser."""

from __future__ import annotations

from typing import Any

import torch

from bla_inductor.algebra.index import as_size, equal
from bla_inductor.algebra.registry import Lookup, Result, Unruled, number, rule, scalar
from bla_inductor.algebra.signs import nonnegative
from bla_inductor.algebra.term import Term, Value, align, constant, guarded, multiply, reciprocal

__all__: list[str] = []

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


def _operand(V: Lookup, x: torch.Tensor) -> Value:
    """An operand of a contraction. A chain of three is as long as attention gets: a longer one
    starts anew.
    """
    value = V(x)
    return value if value.term.depth < 2 else V.cut(x)


def _contract(
    V: Lookup,
    x: torch.Tensor,
    y: torch.Tensor,
    batch: dict[int, int],
    summed: dict[int, int],
    out: torch.Tensor,
) -> Result:
    """Σ over the `summed` pairs of axes of x·y; a product with parameters is a projection, so a
    leaf.
    """
    a, b = _operand(V, x), _operand(V, y)
    if a.term.fixed() or b.term.fixed():
        return None
    a, b = align(a, b.fresh(), batch | summed)
    bound = tuple(i for axis in summed for i in (a.axes[axis] or b.axes[summed[axis]]))
    term = multiply(a.term, b.term).summed(bound, out.dtype)
    axes = [a.axes[i] or b.axes[batch[i]] for i in batch]
    axes += [axis for i, axis in enumerate(a.axes) if i not in batch and i not in summed]
    taken = {*batch.values(), *summed.values()}
    axes += [axis for j, axis in enumerate(b.axes) if j not in taken]
    return Value(term, tuple(axes), out.dtype)


@rule(aten.bmm)
def _bmm(
    V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any
) -> Result:
    return _contract(V, a, b, {0: 0}, {2: 1}, out)


@rule(aten.mm)
def _mm(
    V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any
) -> Result:
    return _contract(V, a, b, {}, {1: 0}, out)


@rule(aten.mv)
def _mv(V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
    return _contract(V, a, b, {}, {1: 0}, out)


@rule(aten.dot)
def _dot(V: Lookup, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
    return _contract(V, a, b, {}, {0: 0}, out)


@rule(aten.baddbmm, aten.addmm)
def _scaled_contraction(
    V: Lookup, out: torch.Tensor, x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1
) -> Result:
    """Only beta = 0, which is how a scaled product is spelled; anything else adds a bias."""
    factor = number(alpha)
    if number(beta) != 0 or factor is None:
        return None
    result = (_bmm if a.dim() == 3 else _mm)(V, out, a, b)
    return (
        Value(result.term.scaled(factor), result.axes, result.dtype)
        if isinstance(result, Value)
        else None
    )


def _broadcast(a: Value, b: Value) -> tuple[Value, Value, tuple[Any, ...]]:
    rank = max(len(a.axes), len(b.axes))
    a = Value(a.term, ((),) * (rank - len(a.axes)) + a.axes, a.dtype)
    b = Value(b.term, ((),) * (rank - len(b.axes)) + b.axes, b.dtype).fresh()
    a, b = align(a, b, {i: i for i in range(rank)})
    return a, b, tuple(x or y for x, y in zip(a.axes, b.axes, strict=True))


@rule(aten.mul)
def _mul(V: Lookup, out: torch.Tensor, x: Any, y: Any) -> Result:
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
    a, b, axes = _broadcast(a, b)
    return Value(multiply(a.term, b.term), axes, out.dtype)


@rule(aten.div)
def _div(V: Lookup, out: torch.Tensor, x: Any, y: Any, *, rounding_mode: Any = None) -> Result:
    if rounding_mode is not None:
        raise Unruled
    factor = number(y)
    value = V(x) if isinstance(x, torch.Tensor) else None
    if factor is not None and value is not None:
        return Value(value.term.scaled(1 / factor), value.axes, out.dtype) if factor != 0 else None
    divisor = V(y)
    if value is None:
        factor = number(x)
        return None if factor is None else _inverted(divisor, out, factor)
    if (value.term.fixed() or divisor.term.fixed()) and not value.term.bound:
        return None
    a, b, axes = _broadcast(value, divisor)
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


def _reduced(
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
    if mean:
        for index in bound:
            term = term.scaled(1 / index.size)
    axes = tuple(
        () if d in chosen else axis
        for d, axis in enumerate(value.axes)
        if keepdim or d not in chosen
    )
    return Value(term, axes, out.dtype)


@rule(aten.sum)
def _sum(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any = None, keepdim: bool = False, **_: Any
) -> Result:
    return _reduced(V, out, x, dims, keepdim, mean=False)


@rule(aten.mean)
def _mean(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, dims: Any = None, keepdim: bool = False, **_: Any
) -> Result:
    return _reduced(V, out, x, dims, keepdim, mean=True)


# The guard of a normaliser: z + eps, max(z, eps).


@rule(aten.add)
def _add(V: Lookup, out: torch.Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Result:
    weight = number(alpha)
    for one, other, factor in ((x, y, weight), (y, x, 1.0 if weight == 1 else None)):
        eps = scalar(V, other)
        if eps is None or factor is None or not isinstance(one, torch.Tensor):
            continue
        value = V(one)
        if one.dim() != out.dim() or any(map(_differ, one.shape, out.shape)):
            continue  # the number was a tensor, and broadcast the other
        if eps == 0:
            return Value(value.term, value.axes, out.dtype)
        if value.term.bound:
            return Value(guarded(value.term, "add", eps * factor), value.axes, out.dtype)
    return None


def _differ(a: Any, b: Any) -> bool:
    return not equal(as_size(a), as_size(b))


@rule(aten.clamp, aten.clamp_min)
def _clamp(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, low: Any = None, high: Any = None, **kw: Any
) -> Result:
    low, high = kw.get("min", low), kw.get("max", high)
    eps, value = scalar(V, low), V(x)
    if high is not None or eps is None or not value.term.bound:
        return None
    return Value(guarded(value.term, "clamp", eps), value.axes, out.dtype)


@rule(aten.maximum)
def _maximum(V: Lookup, out: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Result:
    for one, other in ((x, y), (y, x)):
        eps = scalar(V, other)
        if eps is not None and one.dim() == out.dim():
            return _clamp(V, out, one, eps)
    return None


# Sums in other words.


@rule(aten.abs)
def _abs(V: Lookup, out: torch.Tensor, x: torch.Tensor) -> Result:
    value = V(x)
    return value if value.term.bound and nonnegative(value.term) else None


@rule(aten.linalg_vector_norm)
def _vector_norm(
    V: Lookup,
    out: torch.Tensor,
    x: torch.Tensor,
    order: Any = 2,
    dims: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Result:
    """The L1 norm of what is not negative is its sum."""
    if number(order) != 1 or not nonnegative(V(x).term):
        return None
    return _reduced(V, out, x, dims, keepdim, mean=False)
