"""Bidirectional linear attention, normalised or not, coupled or decoupled.

    out[b,n,d] = s · Σ_c Σ_m q[b,n,c] · k[b,m,c] · v[b,m,d]  ÷  guard(t · Σ_c Σ_m q'[b,n,c] ·
    k'[b,m,c])

Transformers are RNNs, Katharopoulos et al. 2020 (arXiv 2006.16236); without the divisor, Galerkin
attention (Cao 2021, arXiv 2105.14995) and efficient attention (Shen et al. 2018, arXiv 1812.01243).
With q' ≠ q the normaliser is decoupled, as in rotary linear attention (RoFormer, arXiv 2104.09864,
section 3.3).

q(kᵀv) and (qkᵀ)v are the same Term, so both orders are found; so are all layouts, N ≠ M, one-headed
keys and values (the head joins the queries), and V padded with ones. The chain q–k–v reads the same
backwards as v–k–q: the normaliser tells which end the queries are; without one, the longer summed
index is the sequence.

Not handled: a sum of several terms in the numerator, a divisor that is not Σ q'k', a factor that
couples queries with keys (a causal mask, a position bias): Mismatch, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from bla_inductor.patterns.contraction import Contraction, Known, Roles, Unsplittable

from bla_inductor.algebra import Factor, Guard, Index, Read, Size, Term, Value, product

__all__ = ["FAMILY", "LinearAttention", "Mismatch", "match"]

FAMILY = "linear attention"
NUMERATOR = Contraction("q: n c, k: m c, v: m d -> n d")
NORMALISER = Contraction("q: n c, k: m c -> n")

Hint = Callable[[Size], int]


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


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """A Term read as linear attention: the factors of each operand, the indices of each letter."""

    scale: float | sympy.Expr
    q: tuple[Factor, ...]
    k: tuple[Factor, ...]
    v: tuple[Factor, ...]
    batch: tuple[Index, ...]
    n: tuple[Index, ...]
    m: tuple[Index, ...]
    c: tuple[Index, ...]
    d: tuple[Index, ...]
    normaliser: Normaliser | None
    outer: tuple[Factor, ...]

    quadratic: bool  # written as (qkᵀ)v
    precision: torch.dtype | None  # the narrowest dtype that a sum was kept in


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Close to the family, and why it is not of it."""

    reason: str


def match(value: Value, known: Known, hint: Hint) -> LinearAttention | Mismatch | None:
    """`value` as linear attention; None where it does not resemble it.

    known: whether a product of factors is a tensor of the graph; hint: a likely number for a
    symbolic size.
    """
    term = value.term
    guards = [f for f in term.factors if isinstance(f, Guard) and f.power == -1]
    mismatch: Mismatch | None = None
    best: LinearAttention | None = None
    for roles in NUMERATOR.solve(term, known):
        if isinstance(roles, Unsplittable):
            mismatch = mismatch or Mismatch(_coupling(roles))
            continue
        found = _complete(term, roles, guards, known)
        if isinstance(found, Mismatch):
            mismatch = found
        elif best is None or _better(found, best, hint):
            best = found
    if best is None:
        return mismatch
    stray = [i for axis in value.axes for i in axis if i not in {*best.batch, *best.n, *best.d}]
    if stray:
        return Mismatch("the result is expanded along an axis that no operand has")
    if not term.coef:
        return Mismatch("the product is multiplied by zero")
    return best


def _better(a: LinearAttention, b: LinearAttention, hint: Hint) -> bool:
    """The normaliser names the queries; else the longer summed index is the sequence."""
    if (a.normaliser is None) != (b.normaliser is None):
        return a.normaliser is not None
    return hint(product(i.size for i in a.m)) > hint(product(i.size for i in b.m))


def _complete(
    term: Term, roles: Roles, guards: list[Guard], known: Known
) -> LinearAttention | Mismatch:
    """The roles with their normaliser, if one of the outer factors is one."""
    letters, batch, n = roles.letters, roles.batch, roles.letters["n"]
    normaliser = None
    outer = list(roles.outer)
    for guard in [g for g in guards if any(g is f for f in outer)]:
        if not guard.indices() & set(n):
            continue
        found = _normaliser(guard, {*batch, *n}, known)
        if isinstance(found, Mismatch):
            return found
        if normaliser is not None:
            return Mismatch("the result is divided by two normalisers")
        normaliser = found
        outer = [f for f in outer if f is not guard]
    if normaliser is not None:
        keys = frozenset().union(*(f.indices() for f in normaliser.k))
        shared = tuple(i for i in n if i in keys)  # a head that k' has and k has not
        batch, n = (*batch, *shared), tuple(i for i in n if i not in shared)
        if not n:
            return Mismatch("the normaliser has no query axis of its own")
    return LinearAttention(
        term.coef,
        roles.operands["q"],
        roles.operands["k"],
        roles.operands["v"],
        batch,
        n,
        letters["m"],
        letters["c"],
        letters["d"],
        normaliser,
        tuple(outer),
        term.bound[-1] in letters["m"],
        term.precision,
    )


def _normaliser(guard: Guard, allowed: set[Index], known: Known) -> Normaliser | Mismatch:
    for roles in NORMALISER.solve(guard.term, known):
        if isinstance(roles, Unsplittable):
            return Mismatch(f"in the normaliser, {_coupling(roles)}")
        q = (*roles.operands["q"], *roles.outer)
        queries = frozenset().union(*(f.indices() for f in q))
        if queries - set(roles.letters["c"]) <= allowed:
            return Normaliser(
                guard.kind,
                guard.term.coef,
                guard.eps,
                q,
                roles.operands["k"],
                roles.letters["c"],
                roles.letters["m"],
            )
    leaves = ", ".join(sorted({str(leaf) for leaf in guard.term.leaves()}))
    return Mismatch(f"the divisor (of {leaves}) is not a sum of q·k over the keys")


def _coupling(found: Unsplittable) -> str:
    factor = found.factor
    name = str(factor.leaf) if isinstance(factor, Read) else "a divisor"
    return (
        f"`{name}` couples the indices {' and '.join(found.letters)}, which no one of q, k, v has "
        "together, like a causal mask or a position bias: no operand can take it in"
    )
