"""A sum that no other factor takes part in is a tensor of its own.

    Σ_m Σ_j k[m,c] · v[m,d] · x[j]  =  Σ_m k[m,c] · v[m,d] · (Σ_j x[j])

The algebra pulls every sum to the front, because a normaliser is found so. Where a program
multiplies by a mean or a sum (q · x.mean(-2, keepdim=True), a scale that is the mean of |k|), that
hides which factors are contracted with each other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from bla_inductor.algebra.term import Factor, Guard, Read, Term

__all__ = ["apart"]


def apart(term: Term) -> Term:
    """`term` with each sum over one factor alone as one factor, a guard that guards nothing."""
    readers = Counter(i for factor in term.factors for i in factor.indices())
    factors: list[Factor] = []
    for factor in term.factors:
        own = tuple(i for i in term.bound if readers[i] == 1 and i in factor.indices())
        if own and not isinstance(factor, Read):
            return term
        factors.append(Guard(Term((factor,), own), "add", 0.0) if own else factor)
    bound = tuple(i for i in term.bound if readers[i] > 1)
    return replace(term, factors=tuple(factors), bound=bound)
