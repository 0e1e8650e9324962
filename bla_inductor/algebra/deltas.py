"""Sums over a delta: Σ_j δ(i,j) f(j) = f(i).

A block-diagonal mask is δ(head, head') on the merged channels of a state; multiplied by the
queries, whose heads are summed over with their channels, it leaves each head its own block.
"""

from __future__ import annotations

from dataclasses import replace

from bla_inductor.algebra.index import Axis, Index, Inexpressible, refine, substitute_axes
from bla_inductor.algebra.term import Delta, Term, Value

__all__ = ["resolved"]


def resolved(value: Value) -> Value:
    """`value` without the deltas that tie a summed index to another one."""
    while True:
        bound = set(value.term.bound)
        delta = next(
            (
                f
                for f in value.term.factors
                if isinstance(f, Delta) and f.keep and f.indices() & bound
            ),
            None,
        )
        if delta is None:
            return value
        value = _without(value, delta)


def _without(value: Value, delta: Delta) -> Value:
    """The delta told in pairs of single indices; of a pair that is summed over one is left."""
    factors = tuple(f for f in value.term.factors if f is not delta)
    value = replace(value, term=replace(value.term, factors=factors))
    if delta.a == delta.b:
        return _counted(value)
    if set(delta.a) & set(delta.b):
        raise Inexpressible("a shifted diagonal")
    to_a, to_b = refine(delta.a, delta.b)
    (left,) = substitute_axes((delta.a,), to_a)
    right = {i: Index(i.size) for i in left}  # refine calls both sides alike
    apart: dict[Index, Axis] = {i: tuple(right[j] for j in axis) for i, axis in to_b.items()}
    value = value.substitute(to_a).substitute(apart)
    for i, j in right.items():
        term = value.term
        gone, stays = (j, i) if j in term.bound else (i, j)
        if gone in term.bound:
            bound = tuple(x for x in term.bound if x is not gone)
            value = replace(value, term=replace(term, bound=bound)).substitute({gone: (stays,)})
        else:
            pair = Delta((i,), (j,))
            value = replace(value, term=replace(term, factors=(*term.factors, pair)))
    return _counted(value)


def _counted(value: Value) -> Value:
    """A summed index that nothing reads any more counts as its size."""
    term = value.term
    read = frozenset[Index]().union(*(f.indices() for f in term.factors))
    coef = term.coef
    for index in term.bound:
        if index not in read:
            coef = coef * index.size
    bound = tuple(i for i in term.bound if i in read)
    return replace(value, term=Term(term.factors, bound, coef, term.precision, term.depth))
