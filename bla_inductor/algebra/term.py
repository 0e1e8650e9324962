"""Terms: what a tensor is, whatever syntax produced it.

    Term  = coef · Σ_bound Π factors
    factor = leaf[axes] ^ ±1  |  guard(Term) ^ ±1  |  mask  |  delta
    guard = z + eps  |  max(z, eps)
    mask = 1 where a boolean leaf says so, else 0
    delta = 1 where two axes are at the same position, else 0
    Value = Term with output axes, dtype

A leaf is a tensor of the graph that the algebra does not look into. Terms are immutable; every
operation returns a new one. Indices inside a guard's own sum are private to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import fx

from bla_inductor.algebra.index import (
    Axes,
    Axis,
    Index,
    Inexpressible,
    Size,
    Substitution,
    as_size,
    equal,
    refine,
    substitute_axes,
)

__all__ = [
    "Delta",
    "Factor",
    "Guard",
    "Leaf",
    "Mask",
    "Origin",
    "Part",
    "Read",
    "Term",
    "Value",
    "align",
    "broadcast",
    "constant",
    "guarded",
    "leaf_value",
    "multiply",
    "reciprocal",
]

Coefficient: TypeAlias = float | sympy.Expr
_MOST_FACTORS = 12


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a joined leaf: `length` entries along its axis, equal to `value` where told."""

    value: Value | None
    length: Size


@dataclass(frozen=True, slots=True)
class Origin:
    """How a leaf was made: an operator and its arguments, tensors told as Values.

    Without an operator, the leaf is the Value args[0], which is told in things inside one graph
    node, so that nothing outside can name them.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(eq=False, slots=True)
class Leaf:
    """A tensor the algebra does not look into; compared by identity.

    node: the graph node whose result it is, None while it lives inside one node only.
    fixed: it depends on parameters, buffers and constants alone.
    parts: for a padded or concatenated tensor, the axis and its pieces.
    origin: how it was made, where one operator made it.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    fixed: bool
    operation: str
    node: fx.Node | None = None
    born: int = -1
    parts: tuple[int, tuple[Part, ...]] | None = None
    origin: Origin | None = None

    def __repr__(self) -> str:
        return self.node.name if self.node is not None else f"<{self.operation}>"


@dataclass(frozen=True, slots=True)
class Read:
    """leaf[axes] ** power; dtype is the narrowest it was cast to on the way into the product."""

    leaf: Leaf
    axes: Axes
    dtype: torch.dtype
    power: int = 1

    def substitute(self, mapping: Substitution) -> Read:
        return replace(self, axes=substitute_axes(self.axes, mapping))

    def indices(self) -> frozenset[Index]:
        return frozenset(i for axis in self.axes for i in axis)

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True, slots=True)
class Guard:
    """(term + eps) ** power or max(term, eps) ** power."""

    term: Term
    kind: Literal["add", "clamp"]
    eps: Coefficient
    power: int = 1

    def substitute(self, mapping: Substitution) -> Guard:
        return replace(self, term=self.term.substitute(mapping))

    def indices(self) -> frozenset[Index]:
        return self.term.free()

    def leaves(self) -> Iterator[Leaf]:
        return self.term.leaves()


@dataclass(frozen=True, slots=True)
class Mask:
    """1 where the boolean leaf[axes] is `keep`, else 0, whatever the rest of the product is there:
    infinities and NaN vanish.
    """

    leaf: Leaf
    axes: Axes
    keep: bool

    def substitute(self, mapping: Substitution) -> Mask:
        return replace(self, axes=substitute_axes(self.axes, mapping))

    def indices(self) -> frozenset[Index]:
        return frozenset(i for axis in self.axes for i in axis)

    def leaves(self) -> Iterator[Leaf]:
        yield self.leaf


@dataclass(frozen=True, slots=True)
class Delta:
    """1 where the axes `a` and `b`, of one size, are at the same position, else 0; with
    keep=False the other way round.
    """

    a: Axis
    b: Axis
    keep: bool = True

    def substitute(self, mapping: Substitution) -> Delta:
        a, b = substitute_axes((self.a, self.b), mapping)
        return Delta(a, b, self.keep)

    def indices(self) -> frozenset[Index]:
        return frozenset((*self.a, *self.b))

    def leaves(self) -> Iterator[Leaf]:
        return iter(())


Factor = Read | Guard | Mask | Delta


@dataclass(frozen=True, slots=True)
class Term:
    """coef · Σ_bound Π factors.

    precision: the narrowest dtype that a sum of it was kept in; depth: how many contractions deep
    it is.
    """

    factors: tuple[Factor, ...] = ()
    bound: tuple[Index, ...] = ()
    coef: Coefficient = 1.0
    precision: torch.dtype | None = None
    depth: int = 0

    def substitute(self, mapping: Substitution) -> Term:
        if not mapping:
            return self
        return replace(
            self,
            factors=tuple(f.substitute(mapping) for f in self.factors),
            bound=substitute_axes((self.bound,), mapping)[0],
        )

    def free(self) -> frozenset[Index]:
        return frozenset().union(*(f.indices() for f in self.factors)) - set(self.bound)

    def leaves(self) -> Iterator[Leaf]:
        for factor in self.factors:
            yield from factor.leaves()

    def fixed(self) -> bool:
        """It depends on parameters, buffers and constants, and on at least one of them."""
        leaves = list(self.leaves())
        return bool(leaves) and all(leaf.fixed for leaf in leaves)

    def constant(self) -> bool:
        """It depends on nothing: a number, or a number where a delta is one."""
        return not self.bound and next(self.leaves(), None) is None

    def scaled(self, by: Coefficient) -> Term:
        return replace(self, coef=_times(self.coef, by))

    def summed(self, indices: Axis, dtype: torch.dtype) -> Term:
        """Σ over `indices`, kept in `dtype`; an index that nothing reads counts as its size."""
        read = frozenset().union(*(f.indices() for f in self.factors))
        coef = self.coef
        for index in indices:
            if index not in read:
                coef = coef * index.size
        bound = self.bound + tuple(i for i in indices if i in read)
        precision = _narrower(self.precision, dtype)
        return Term(self.factors, bound, coef, precision, self.depth + bool(indices))


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: what it is (`term`), how it is laid out (`axes`), and the dtype it is kept in."""

    term: Term
    axes: Axes
    dtype: torch.dtype

    def substitute(self, mapping: Substitution) -> Value:
        if not mapping:
            return self
        return Value(self.term.substitute(mapping), substitute_axes(self.axes, mapping), self.dtype)

    def fresh(self) -> Value:
        """The same value in new indices: it can be combined with anything, itself included."""
        old = {i for axis in self.axes for i in axis} | set(self.term.bound)
        return self.substitute({i: (Index(i.size),) for i in old})

    def cast(self, dtype: torch.dtype) -> Value:
        """To another dtype. What is still a plain product remembers that it was narrowed."""
        term = self.term
        if not term.bound and dtype.is_floating_point:
            term = replace(term, factors=tuple(_narrow(f, dtype) for f in term.factors))
        return Value(term, self.axes, dtype)


def _narrow(factor: Factor, dtype: torch.dtype) -> Factor:
    if isinstance(factor, Read) and factor.dtype.itemsize > dtype.itemsize:
        return replace(factor, dtype=dtype)
    return factor


def leaf_value(leaf: Leaf) -> Value:
    """The leaf itself, read in full."""
    axes = tuple(() if equal(size, 1) else (Index(size),) for size in leaf.shape)
    return Value(Term((Read(leaf, axes, leaf.dtype),)), axes, leaf.dtype)


def constant(number: Coefficient, tensor: torch.Tensor) -> Value:
    """A tensor filled with one number, as its dtype has it."""
    number = _stored(number, tensor.dtype)
    sizes = [as_size(s) for s in tensor.shape]
    axes = tuple(() if equal(size, 1) else (Index(size),) for size in sizes)
    return Value(Term(coef=number), axes, tensor.dtype)


def _stored(number: Coefficient, dtype: torch.dtype) -> Coefficient:
    """What a tensor of integers or booleans makes of a number."""
    if dtype.is_floating_point or dtype.is_complex:
        return number
    if not isinstance(number, int | float):
        if number.is_integer and dtype == torch.int64:
            return number
        raise Inexpressible("a symbolic number in a dtype that may not have it")
    if dtype == torch.bool:
        return float(number != 0)
    limits = torch.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise Inexpressible("a number that the dtype does not have")
    return float(int(number))


def align(a: Value, b: Value, pairs: Mapping[int, int]) -> tuple[Value, Value]:
    """Both values rewritten so that axis i of `a` and axis `pairs[i]` of `b` are the same indices.

    An axis of size one is left alone: it broadcasts. `b` must be fresh.
    """
    for i, j in pairs.items():
        if a.axes[i] and b.axes[j]:
            to_a, to_b = refine(a.axes[i], b.axes[j])
            a, b = a.substitute(to_a), b.substitute(to_b)
    return a, b


def broadcast(a: Value, b: Value) -> tuple[Value, Value, Axes]:
    """Both values in common indices, and the axes of what is made of them entry by entry."""
    rank = max(len(a.axes), len(b.axes))
    a = Value(a.term, ((),) * (rank - len(a.axes)) + a.axes, a.dtype)
    b = Value(b.term, ((),) * (rank - len(b.axes)) + b.axes, b.dtype).fresh()
    a, b = align(a, b, {i: i for i in range(rank)})
    return a, b, tuple(x or y for x, y in zip(a.axes, b.axes, strict=True))


def multiply(a: Term, b: Term) -> Term:
    """a · b; their bound indices must be different ones."""
    factors = a.factors + b.factors
    if len(factors) > _MOST_FACTORS:
        raise Inexpressible("too long a product to be attention")
    precision = _narrower(a.precision, b.precision)
    depth = max(a.depth, b.depth)
    return Term(factors, a.bound + b.bound, _times(a.coef, b.coef), precision, depth)


def _times(a: Coefficient, b: Coefficient) -> Coefficient:
    product = a * b
    if isinstance(product, float) and not math.isfinite(product):
        raise Inexpressible("times infinity, which is no number where the product has a zero")
    return product


def _narrower(a: torch.dtype | None, b: torch.dtype | None) -> torch.dtype | None:
    if a is None or b is None:
        return a or b
    return a if a.itemsize <= b.itemsize else b


def reciprocal(term: Term) -> Term:
    """1 / term: a plain product is inverted factor by factor, a sum goes below the line whole."""
    if any(not isinstance(f, Read | Guard) for f in term.factors) and not term.bound:
        raise Inexpressible("the reciprocal of zeros")
    if term.bound:
        return Term((Guard(_private(term), "add", 0.0, -1),))
    powers = tuple(replace(f, power=-f.power) for f in term.factors if isinstance(f, Read | Guard))
    return Term(powers, (), 1 / term.coef)


def guarded(term: Term, kind: Literal["add", "clamp"], eps: Coefficient) -> Term:
    """term + eps, or max(term, eps)."""
    return Term((Guard(_private(term), kind, eps),))


def _private(term: Term) -> Term:
    """The same sum over indices of its own, so that no substitution can capture them."""
    return term.substitute({i: (Index(i.size),) for i in term.bound})
