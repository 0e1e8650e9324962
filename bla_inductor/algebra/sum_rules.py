"""Sums: of a product and a number, which guard a normaliser; of a product and a tensor, in one
operator; and norms that are sums.

    z + eps | max(z, eps)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from bla_inductor.algebra.index import Axis, as_size, axis_size, equal
from bla_inductor.algebra.product_rules import bmm, contract, div, mm, mul, mv, reduced
from bla_inductor.algebra.registry import Lookup, Result, number, rule, scalar
from bla_inductor.algebra.signs import may_be_met, nonnegative
from bla_inductor.algebra.term import Guard, Leaf, Origin, Term, Value, guarded, leaf_value
from bla_inductor.algebra.tiles import tiled

__all__ = ["added"]

aten = torch.ops.aten


@rule(aten.add)
def _add(V: Lookup, out: torch.Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Result:
    weight = number(alpha)
    for one, other, factor in ((x, y, weight), (y, x, 1.0 if weight == 1 else None)):
        eps = scalar(V, other)
        if eps is None or factor is None or not isinstance(one, torch.Tensor):
            continue
        if one.dim() != out.dim() or any(map(_differ, one.shape, out.shape)):
            continue  # the number was a tensor, and broadcast the other
        found = _guarded_by(V(one), eps * factor, out)
        if found is not None:
            return found
    if weight == 1 and isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return _tiled(V(x), V(y), out)
    return None


def _tiled(a: Value, b: Value, out: torch.Tensor) -> Value | None:
    if any(len(v.axes) != out.dim() or any(map(_other, v.axes, out.shape)) for v in (a, b)):
        return None
    value = tiled(a, b)
    return None if value is None else Value(value.term, value.axes, out.dtype)


@rule(aten.sub)
def _sub(V: Lookup, out: torch.Tensor, x: Any, y: Any, *, alpha: Any = 1) -> Result:
    weight = number(alpha)
    return None if weight is None or scalar(V, y) is None else _add(V, out, x, y, alpha=-weight)


def _guarded_by(value: Value, eps: Any, out: torch.Tensor) -> Value | None:
    if eps == 0:
        return Value(value.term, value.axes, out.dtype)
    if value.term.bound:
        return Value(guarded(value.term, "add", eps), value.axes, out.dtype)
    match value.term:
        case Term(factors=(Guard(kind="add", power=1) as guard,), coef=coef) if coef != 0:
            both = replace(guard, eps=guard.eps + eps / coef)  # c·(z + eps) + eps'
            return Value(replace(value.term, factors=(both,)), value.axes, out.dtype)
    return None


def _differ(a: Any, b: Any) -> bool:
    return not equal(as_size(a), as_size(b))


@rule(aten.clamp, aten.clamp_min)
def _clamp(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, low: Any = None, high: Any = None, **kw: Any
) -> Result:
    low, high = kw.get("min", low), kw.get("max", high)
    eps, value = scalar(V, low), V(x)
    above = high is None or scalar(V, high) == math.inf
    if not above or eps is None or not value.term.bound:
        return None
    return Value(guarded(value.term, "clamp", eps), value.axes, out.dtype)


@rule(aten.maximum)
def _maximum(V: Lookup, out: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Result:
    for one, other in ((x, y), (y, x)):
        eps = scalar(V, other)
        # where they are equal, either gets half of the gradient
        if eps is not None and one.dim() == out.dim() and not may_be_met(eps):
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
    return reduced(V, out, x, dims, keepdim, mean=False)


# A product and a tensor, added in one operator.


@rule(aten.baddbmm, aten.addmm, aten.addmv)
def _added_contraction(
    V: Lookup, out: torch.Tensor, x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1
) -> Result:
    ranks = {3: bmm, 2: mm if b.dim() == 2 else mv}
    return added(V, out, ranks[a.dim()](V, out, a, b), x, alpha, beta)


@rule(aten.addbmm)
def _addbmm(
    V: Lookup, out: torch.Tensor, x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1
) -> Result:
    product = contract(V, a, b, {}, {0: 0, 2: 1}, out)
    return added(V, out, product, x, alpha, beta)


@rule(aten.addcmul)
def _addcmul(V: Lookup, out: torch.Tensor, x: Any, a: Any, b: Any, *, value: Any = 1) -> Result:
    return added(V, out, mul(V, out, a, b), x, value)


@rule(aten.addcdiv)
def _addcdiv(V: Lookup, out: torch.Tensor, x: Any, a: Any, b: Any, *, value: Any = 1) -> Result:
    return added(V, out, div(V, out, a, b), x, value)


def added(
    V: Lookup, out: torch.Tensor, product: Result, x: torch.Tensor, alpha: Any = 1, beta: Any = 1
) -> Result:
    """alpha · product + beta · x, in one operator: a leaf that remembers the two."""
    alpha, beta = number(alpha), number(beta)
    if not isinstance(product, Value) or alpha is None or beta is None:
        return None
    product = Value(product.term.scaled(alpha), product.axes, product.dtype)
    if not product.term.bound or any(map(_other, product.axes, out.shape)):
        return None  # x is the larger, and the product broadcast to it
    added = 0.0 if beta == 0 else scalar(V, x)
    if added is not None:
        return _guarded_by(product, added * beta, out)
    bias = V(x)
    fixed = all(leaf.fixed for v in (product, bias) for leaf in v.term.leaves())
    shape = tuple(as_size(s) for s in out.shape)
    origin = Origin(aten.add, (product, bias), (("alpha", beta),))
    return leaf_value(Leaf(shape, out.dtype, fixed, "add", origin=origin))


def _other(axis: Axis, size: Any) -> bool:
    return not equal(axis_size(axis), as_size(size))
