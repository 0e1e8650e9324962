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

A divisor that is not Σ q'k' in one of the guards, or a term added to the numerator, leaves the
numerator alone as the match, with a note. Not handled: a factor that couples queries with keys (a
causal mask, a position bias), or features with value channels: Mismatch, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import sympy
import torch
from bla_inductor.patterns.contraction import Contraction, Known, Roles, Unsplittable
from bla_inductor.patterns.normaliser import (
    OUTSIDE,
    Mismatch,
    Normaliser,
    coupling,
    hidden,
    normaliser,
)

from bla_inductor.algebra import (
    SLICE,
    Delta,
    Factor,
    Guard,
    Index,
    Leaf,
    Read,
    Size,
    Term,
    Value,
    apart,
    product,
)

__all__ = ["FAMILY", "LinearAttention", "Mismatch", "match"]

FAMILY = "linear attention"
NUMERATOR = Contraction("q: n c, k: m c, v: m d -> n d")

aten = torch.ops.aten
_SUMS = (aten.add, aten.sub)
_MOST_SUMS = 6
_MOST_FEATURES = 128  # of a head, nearly always
Hint = Callable[[Size], int]


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
    note: str = ""  # why a divisor is not the normaliser


def match(value: Value, known: Known, hint: Hint) -> LinearAttention | Mismatch | None:
    """`value` as linear attention; None where it does not resemble it.

    known: whether a product of factors is a tensor of the graph; hint: a likely number for a
    symbolic size.
    """
    value = replace(value, term=apart(value.term))
    term = value.term
    mismatch: Mismatch | None = None
    coupled: Unsplittable | None = None
    best: LinearAttention | None = None
    notes: dict[tuple[Index, ...], str] = {}  # by the key indices, which tell the readings apart
    for roles in NUMERATOR.solve(term, known):
        if isinstance(roles, Unsplittable):
            if coupled is None or _longer(roles.keys, coupled.keys, hint):
                coupled = roles
            continue
        found = _complete(term, roles, known)
        if isinstance(found, Mismatch):
            mismatch = found
            continue
        notes[found.m] = notes.get(found.m) or found.note
        if best is None or _better(found, best, hint):
            best = found
    if best is None and mismatch is None and coupled is not None:
        return Mismatch(coupling(coupled))
    if best is None:
        mismatch = mismatch or _added(term, known, hint) or _heads_summed(value, known, hint)
        return mismatch or _slice_divided(term, known, hint)
    stray = [i for axis in value.axes for i in axis if i not in {*best.batch, *best.n, *best.d}]
    if stray:
        return Mismatch("the result is expanded along an axis that no operand has")
    if not term.coef:
        return Mismatch("the product is multiplied by zero")
    return best if best.normaliser is not None else replace(best, note=notes[best.m])


def _added(term: Term, known: Known, hint: Hint) -> Mismatch | None:
    """Attention to which something is added before the next step can be told."""
    for factor in term.factors:
        others = frozenset[Index]().union(*(f.indices() for f in term.factors if f is not factor))
        contracted = factor.indices() & set(term.bound) & others
        if isinstance(factor, Guard) and factor.power == 1 and contracted:
            inner = [f for f in factor.term.factors if isinstance(f, Read)]
            # Σk + eps has none of the value channels that kᵀv keeps
            if len(inner) > 1 and not factor.indices() <= others:
                return _between(factor, contracted, hint)
        if not isinstance(factor, Read) or term.bound:
            continue
        summands = [v for v in _summands(factor.leaf) if len(v.term.bound) > 1]
        matches = [match(value, known, hint) for value in summands]
        found = [m for m in matches if isinstance(m, LinearAttention) and _normalised_by(term, m)]
        if len(found) > 1 and len({frozenset(_leaves(m.v)) for m in found}) == 1:
            return Mismatch(
                f"`{factor.leaf}` adds products with the same values before the division; with the "
                "features joined, torch.cat((q1, q2), -1) and torch.cat((k1, k2), -1), they are "
                "one product, which takes its normaliser in"
            )
        if found:
            return Mismatch(
                f"`{factor.leaf}` adds a term to the numerator before the division: the "
                "term and the division stay outside the operator"
            )
    return None


def _heads_summed(value: Value, known: Known, hint: Hint) -> Mismatch | None:
    """Attention whose second product sums over an axis that q, k and v have, the heads say."""
    term = value.term
    reads = [f.indices() for f in term.factors if isinstance(f, Read) and f.power == 1]
    heads = tuple(i for i in term.bound if len(reads) > 2 and all(i in read for read in reads))
    if not heads:
        return None
    bound = tuple(i for i in term.bound if i not in heads)
    each = Value(replace(term, bound=bound), (heads, *value.axes), value.dtype)
    if not isinstance(match(each, known, hint), LinearAttention):
        return None
    return Mismatch(
        "its last product sums over an axis that q, k and v all have (the heads, say); keep that "
        "axis in the result and sum over it afterwards, out.sum(1): then the product is found",
        inner=True,
    )


def _slice_divided(term: Term, known: Known, hint: Hint) -> Mismatch | None:
    """A slice of attention divided by another one, which may be its normaliser."""
    reads = [f for f in term.factors if isinstance(f, Read)]
    divisors = [whole.term for f in reads if f.power == -1 for whole in _wholes(f.leaf)]
    for read in reads:
        for whole in _wholes(read.leaf) if read.power == 1 and divisors else ():
            attention = isinstance(match(whole, known, hint), LinearAttention)
            if attention and whole.term in divisors:
                return Mismatch(
                    f"a slice of the product is divided by another slice, `{read.leaf}` by what is "
                    "left; if that is a column of ones beside the values, join it by "
                    "F.pad(v, (0, 1), value=1.0) or torch.cat, and the division is part of the "
                    "operator"
                )
    return None


def _wholes(leaf: Leaf) -> Iterator[Value]:
    """Products that `leaf` is made of a slice of."""
    pending, steps = [leaf], 0
    while pending and steps < _MOST_SUMS:
        leaf, steps = pending.pop(0), steps + 1
        values = [a for a in leaf.origin.args if isinstance(a, Value)] if leaf.origin else []
        if leaf.origin is not None and leaf.origin.operator == SLICE:
            yield from (v for v in values if len(v.term.bound) > 1)
        pending += [r.leaf for v in values for r in v.term.factors if isinstance(r, Read)]


def _between(guard: Guard, summed: frozenset[Index], hint: Hint) -> Mismatch:
    """Why a first product with a number added, or a bound, cannot be reordered with the second.

    The longer summed index is the sequence: the state kᵀv sums over it, the scores q·kᵀ do not.
    """
    state = _longer(guard.term.bound, tuple(summed), hint)
    first, other = ("product kᵀv", "q") if state else ("scores q·kᵀ", "v")
    if guard.kind == "clamp":
        return Mismatch(
            f"a number bounds the {first} before the product with {other}, so that the two cannot "
            "be reordered; bound q, k, v or the result, if that is what is meant"
        )
    rest = "q.sum(-1, keepdim=True)" if state else "v.sum(-2, keepdim=True)"
    return Mismatch(
        f"a number is added to the {first} before the product with {other}; "
        f"write q @ (k.mT @ v) + number * {rest}, of which the product is found"
    )


def _normalised_by(term: Term, found: LinearAttention) -> bool:
    """Whether `term` is divided by a sum, or by what is made of a sum over the keys of `found`."""
    inside, numerator = set(_leaves(found.q, found.k)), Counter(_leaves(found.q, found.k, found.v))
    return any(
        isinstance(f, Guard) or (isinstance(f, Read) and hidden(f, inside, numerator) is not None)
        for f in term.factors
        if _divides(f)
    )


def _leaves(*operands: tuple[Factor, ...]) -> list[Leaf]:
    return [leaf for factors in operands for f in factors for leaf in f.leaves()]


def _summands(leaf: Leaf) -> Iterator[Value]:
    """What `leaf` is the sum of, where that may be a sum again."""
    pending, steps = [leaf], 0
    while pending and steps < _MOST_SUMS:
        origin, steps = pending.pop(0).origin, steps + 1
        if origin is not None and origin.operator in _SUMS:
            values = [a for a in origin.args if isinstance(a, Value)]
            yield from values
            pending += [r.leaf for v in values for r in v.term.factors if isinstance(r, Read)]


def _better(a: LinearAttention, b: LinearAttention, hint: Hint) -> bool:
    """The normaliser names the queries, else the longer summed index is the sequence. But where the
    state is normalised, kv / kv.sum(-2), no tokens become features for that.
    """
    if (a.normaliser is None) != (b.normaliser is None):
        normalised, plain = (b, a) if a.normaliser is None else (a, b)
        return (a is plain) == _tokens_are_features(normalised, hint)
    return _longer(a.m, b.m, hint)


def _tokens_are_features(found: LinearAttention, hint: Hint) -> bool:
    """Whether the product that was written first sums over more than heads have features."""
    return found.quadratic and hint(product(i.size for i in found.c)) > _MOST_FEATURES


def _longer(a: tuple[Index, ...], b: tuple[Index, ...], hint: Hint) -> bool:
    return hint(product(i.size for i in a)) > hint(product(i.size for i in b))


def _complete(term: Term, roles: Roles, known: Known) -> LinearAttention | Mismatch:
    """The roles with their normaliser, if one of the outer factors is one."""
    letters, batch, n = roles.letters, roles.batch, roles.letters["n"]
    if any(isinstance(f, Delta) for f in term.factors):
        return Mismatch("the result is spread over a diagonal, which stays outside the operator")
    chosen: Normaliser | None = None
    outer, note = list(roles.outer), ""
    beside = (*roles.operands["q"], *roles.operands["k"])
    leaves = {leaf for f in beside for leaf in f.leaves()}
    numerator = Counter(leaf for f in (*beside, *roles.operands["v"]) for leaf in f.leaves())
    for factor in [f for f in outer if _divides(f) and f.indices() & set(n)]:
        if isinstance(factor, Guard):
            found = normaliser(factor, {*batch, *n}, beside, known)
            if isinstance(found, Normaliser) and chosen is None:
                chosen = found
                outer = [f for f in outer if f is not factor]
            elif isinstance(found, Mismatch):
                note = note or found.reason
        elif isinstance(factor, Read) and (unfused := hidden(factor, leaves, numerator)):
            note = note or unfused.reason
    if chosen is not None:
        keys = frozenset[Index]().union(*(f.indices() for f in chosen.k))
        shared = tuple(i for i in n if i in keys)  # a head that k' has and k has not
        if len(shared) < len(n):
            batch, n = (*batch, *shared), tuple(i for i in n if i not in shared)
        else:
            chosen, outer = None, list(roles.outer)
            note = note or f"{OUTSIDE}: every query has keys of its own in it"
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
        chosen,
        tuple(outer),
        term.bound[-1] in letters["m"],
        term.precision,
        note if chosen is None else "",  # of one that is inside, others are none
    )


def _divides(factor: Factor) -> bool:
    return isinstance(factor, Guard | Read) and factor.power == -1
