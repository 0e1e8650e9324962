"""Which divisor of a linear attention is its normaliser, and why another one is not.

    guard(scale · Σ_c Σ_m q'[n,c] · k'[m,c])

`guard(z)` is z, z + eps or max(z, eps). Anything else stays outside the operator, which then does
the numerator alone: nothing is lost but a pass over q and k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy
from bla_inductor.patterns.contraction import Contraction, Known, Unsplittable

from bla_inductor.algebra import (
    Axis,
    Delta,
    Factor,
    Guard,
    Index,
    Inexpressible,
    Leaf,
    Mask,
    Read,
    Term,
    Value,
    refine,
)

__all__ = ["OUTSIDE", "Mismatch", "Normaliser", "coupling", "hidden", "normaliser"]

NORMALISER = Contraction("q: n c, k: m c -> n")
OUTSIDE = "its normaliser stays outside the operator"
_MOST_STEPS = 6


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Close to the family, and why it is not of it. inner: no news where an input is of it."""

    reason: str
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Normaliser:
    """guard(scale · Σ_c Σ_m q[n,c] k[m,c]), with its own feature indices c and key indices m."""

    kind: Literal["add", "clamp"]
    scale: float | sympy.Expr
    eps: float | sympy.Expr
    q: tuple[Factor, ...]
    k: tuple[Factor, ...]
    c: tuple[Index, ...]
    m: tuple[Index, ...]


def normaliser(
    guard: Guard, allowed: set[Index], beside: Sequence[Factor], known: Known
) -> Normaliser | Mismatch:
    """A divisor as a normaliser, whose queries have no indices but `allowed` ones and c.

    beside: q and k of the numerator. What the two share is told in indices that are split alike.
    """
    term = _apart_like(_split_like(guard.term, beside), beside)
    for roles in NORMALISER.solve(term, known):
        if isinstance(roles, Unsplittable):
            return Mismatch(f"{OUTSIDE}: in it, {coupling(roles)}")
        q = (*roles.operands["q"], *roles.outer)
        if any(isinstance(f, Delta) for f in guard.term.factors):
            return Mismatch(f"{OUTSIDE}: a mask that compares positions decides what it sums")
        queries = frozenset[Index]().union(*(f.indices() for f in q))
        if queries - set(roles.letters["c"]) <= allowed:
            k, c, m = roles.operands["k"], roles.letters["c"], roles.letters["m"]
            return Normaliser(guard.kind, guard.term.coef, guard.eps, q, k, c, m)
    for factor in guard.term.factors:
        if isinstance(factor, Guard) and factor.power == 1:
            done, instead = "is added to", "add it to the product instead, q·Σk + eps"
            if factor.kind == "clamp":
                done, instead = "bounds", "bound the product instead, max(q·Σk, eps)"
            return Mismatch(f"{OUTSIDE}: a number {done} Σk before the product with q; {instead}")
    leaves = ", ".join(sorted({str(leaf) for leaf in guard.term.leaves()}))
    return Mismatch(f"{OUTSIDE}: the divisor (of {leaves}) is not a sum of q·k over the keys")


def _split_like(term: Term, beside: Sequence[Factor]) -> Term:
    """`term` with its summed indices as fine as the same leaves have them in `beside`."""
    for theirs in [f for f in beside if isinstance(f, Read)]:
        for mine in [f for f in term.factors if isinstance(f, Read) and f.leaf is theirs.leaf]:
            for have, want in zip(mine.axes, theirs.axes, strict=True):
                try:
                    finer, _ = refine(have, want)
                except Inexpressible:
                    continue
                if finer.keys() <= set(term.bound):
                    term = term.substitute(finer)
    return term


def _apart_like(term: Term, beside: Sequence[Factor]) -> Term:
    """`term` with those sums of single factors apart that are in `beside`: Σ_j x[j] · q is a q."""
    for sum_ in [f for f in beside if isinstance(f, Guard) and f.power == 1]:
        for mine in [f for f in term.factors if isinstance(f, Read)]:
            own = _summed_alike(mine, sum_.term, term)
            if own:
                whole = Guard(Term((mine,), own), "add", 0.0)
                factors = tuple(whole if f is mine else f for f in term.factors)
                bound = tuple(i for i in term.bound if i not in own)
                term = replace(term, factors=factors, bound=bound)
                break
    return term


def _summed_alike(mine: Read, theirs: Term, term: Term) -> Axis:
    """The indices that `term` sums over in `mine` alone, if `theirs` is that sum."""
    (read, *others) = theirs.factors
    if others or not isinstance(read, Read) or read.leaf is not mine.leaf:
        return ()
    own = [
        i
        for have, want in zip(mine.axes, read.axes, strict=True)
        for i in have
        if set(want) & set(theirs.bound)
    ]
    elsewhere = {i for f in term.factors if f is not mine for i in f.indices()}
    return tuple(own) if set(own) <= set(term.bound) - elsewhere else ()


def hidden(divisor: Read, inside: set[Leaf], numerator: Counter[Leaf]) -> Mismatch | None:
    """A divisor that is made from a sum of q·k in a way that is not fused; inside: leaves of q, k;
    numerator: those of q, k and v.

    None where it is something else altogether, a norm of the result for one.
    """
    pending, steps = [divisor.leaf], 0
    while pending and steps < _MOST_STEPS:
        leaf, steps = pending.pop(0), steps + 1
        values = [a for a in leaf.origin.args if isinstance(a, Value)] if leaf.origin else []
        for value in values:
            sums = [Counter(term.leaves()) for term in _sums(value.term)]
            if any(inside <= set(of) and not numerator <= of for of in sums):
                return Mismatch(
                    f"{OUTSIDE}: `{leaf.operation}` comes between Σ q·k and the division, "
                    "and only z, z + eps and max(z, eps) are part of it"
                )
            pending += value.term.leaves()
    return None


def coupling(found: Unsplittable) -> str:
    """Why a factor fits no operand."""
    factor = found.factor
    letters = " and ".join(found.letters)
    if isinstance(factor, Delta):
        return (
            f"a mask that compares positions along {letters} couples those indices: "
            "no operand can take it in"
        )
    name = f"`{factor.leaf}`" if isinstance(factor, Read | Mask) else "a divisor"
    beside = {leaf for f in found.beside for leaf in f.leaves()}
    if isinstance(factor, Read | Mask) and _made_of_product(factor.leaf, beside):
        return (
            f"{name} is made of the product that it multiplies, so that a function of that stands "
            "between the two products, which cannot be reordered; apply it to q, k or v, or to the "
            "result, if that is what is meant"
        )
    like = ", like a causal mask or a position bias" if found.letters == ("n", "m") else ""
    return (
        f"{name} couples the indices {letters}, which no one of q, k, v has "
        f"together{like}: no operand can take it in"
    )


def _made_of_product(leaf: Leaf, beside: set[Leaf]) -> bool:
    """Whether `leaf` is a function of a sum of products of the tensors that it stands beside."""
    pending, steps = [leaf], 0
    while pending and steps < _MOST_STEPS:
        origin, steps = pending.pop(0).origin, steps + 1
        for value in [a for a in origin.args if isinstance(a, Value)] if origin else []:
            leaves = list(value.term.leaves())
            if value.term.bound and len(leaves) > 1 and set(leaves) <= beside:
                return True
            pending += leaves
    return False


def _sums(term: Term) -> Iterator[Term]:
    if term.bound:
        yield term
    for factor in term.factors:
        if isinstance(factor, Guard):
            yield from _sums(factor.term)
