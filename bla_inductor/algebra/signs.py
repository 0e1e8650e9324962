"""Which tensors are known to have no negative entries, and which bounds a sum is never exactly at.

|x| = x is what makes an L1 norm a plain sum: rows of φ(Q)φ(K)ᵀ divided by their L1 norm are
normalised linear attention, where φ is not negative.
"""

from __future__ import annotations

from typing import Any

import torch

from bla_inductor.algebra.registry import number
from bla_inductor.algebra.term import Factor, Guard, Leaf, Read, Term, Value
from bla_inductor.compat import clamp_is_flat_at_its_bounds

__all__ = ["may_be_met", "nonnegative"]

aten = torch.ops.aten
_ALWAYS = {
    aten.relu,
    aten.exp,
    aten.sigmoid,
    aten._softmax,
    aten.abs,
    aten.softplus,
    aten.hardsigmoid,
    aten.sqrt,
    aten.exp2,
    aten.square,
    aten.cosh,
}
_SMALL = 2.0**-6
# min f(x), so that f(x) + c is not negative for c ≥ -min
_BELOW = {aten.elu: -1.0, aten.tanh: -1.0, aten.sin: -1.0, aten.cos: -1.0, aten.erf: -1.0}


def may_be_met(bound: Any) -> bool:
    """Whether a normaliser may be exactly `bound`: a count may be 0 or 1; 1e-6 is met by chance."""
    return not isinstance(bound, float) or not 0 < bound < _SMALL


def nonnegative(term: Term) -> bool:
    """Whether every entry of the term is known to be ≥ 0 (or NaN)."""
    sign = getattr(term.coef, "is_negative", None) if not isinstance(term.coef, float) else None
    if isinstance(term.coef, int | float):
        sign = term.coef < 0
    if sign is not False:
        return False
    return all(_factor(f) for f in term.factors)


def _factor(factor: Factor) -> bool:
    if isinstance(factor, Guard):
        return _guard(factor)
    return not isinstance(factor, Read) or _leaf(factor.leaf)


def _guard(guard: Guard) -> bool:
    eps = guard.eps
    return isinstance(eps, int | float) and eps >= 0 and nonnegative(guard.term)


def _leaf(leaf: Leaf) -> bool:
    origin = leaf.origin
    if origin is None:
        return False
    if origin.operator is None:
        return nonnegative(origin.args[0].term)
    first: Any = origin.args[0] if origin.args else None
    if origin.operator in _ALWAYS:
        return True
    if origin.operator is aten.pow:
        exponent = number(origin.args[1])
        even = isinstance(exponent, float) and exponent % 2 == 0
        return even or (isinstance(first, Value) and nonnegative(first.term))
    if origin.operator in (aten.clamp, aten.clamp_min):
        low = number(
            dict(origin.kwargs).get("min", origin.args[1] if len(origin.args) > 1 else None)
        )
        # at 0 clamp passes the gradient on, and |x| does not
        flat = clamp_is_flat_at_its_bounds()
        return isinstance(low, float) and (low > 0 or (low == 0 and flat))
    if origin.operator is aten.add and isinstance(first, Value):
        return _sum(first, origin.args[1], dict(origin.kwargs).get("alpha", 1))
    if origin.operator in (aten.native_dropout, aten.detach) and isinstance(first, Value):
        return nonnegative(first.term)
    return False


def _sum(first: Value, second: Any, alpha: Any) -> bool:
    """a + b: both not negative, or a bounded function and a number above its bound."""
    if isinstance(second, Value):
        return alpha == 1 and nonnegative(first.term) and nonnegative(second.term)
    shift = number(second)
    if not isinstance(shift, float) or alpha != 1:
        return False
    if shift >= 0 and nonnegative(first.term):
        return True
    factors = first.term.factors
    if len(factors) != 1 or not isinstance(factors[0], Read) or first.term.coef != 1:
        return False
    origin = factors[0].leaf.origin
    if origin is None or origin.operator not in _BELOW or any(a != 1 for a in origin.args[1:]):
        return False
    return shift >= -_BELOW[origin.operator]
