"""The table of ATen rules, and how scalars enter the algebra.

Below autograd only a small vocabulary arrives, whatever the user wrote (`@`, einsum, einops,
methods). Layout operators relabel axes, products unite them, contractions bind them, divisions go
below the line. An operator
without a rule, or whose rule returns None or raises, gives a new leaf: nothing is lost but depth.

A rule gets `V`, the function from tensors to Values, then the (fake) result, then the operator's
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from bla_inductor.algebra.term import Value

__all__ = ["LAYOUT", "RULES", "Lookup", "Result", "Rule", "Unruled", "number", "rule", "scalar"]


class Lookup(Protocol):
    """What the rules know of tensors."""

    def __call__(self, tensor: torch.Tensor) -> Value:
        """The Value of a tensor."""

    def cut(self, tensor: torch.Tensor) -> Value:
        """The tensor told in the leaf that the last graph node before it is; Unruled where there is
        none.
        """


Result = Value | Sequence[Value | None] | None
Rule = Callable[..., Result]
RULES: dict[Any, Rule] = {}
LAYOUT: set[Any] = set()  # operators that only relabel axes


class Unruled(Exception):
    """This use of the operator has no meaning in the algebra: its result is a new leaf."""


def rule(*packets: Any, layout: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators; `layout` where they change axes alone."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        if layout:
            LAYOUT.update(packets)
        return function

    return register


def number(x: object) -> float | sympy.Expr | None:
    """A Python or symbolic scalar as a coefficient; None for anything else.

    Torch's symbolic true division and power become sympy's own, so that n**-0.5 twice is 1/n.
    """
    if isinstance(x, bool):
        return None
    if isinstance(x, int | float):
        return float(x)
    if isinstance(x, torch.SymInt | torch.SymFloat):
        return _plain(x.node.expr)
    return None


def _plain(expr: sympy.Expr) -> sympy.Expr:
    plain = {
        "FloatTrueDiv": lambda a, b: a / b,
        "IntTrueDiv": lambda a, b: a / b,
        "FloatPow": _power,
        "PowByNatural": _power,
        "ToFloat": lambda a: a,
        "OpaqueUnaryFn_sqrt": sympy.sqrt,
    }
    args = [_plain(a) for a in expr.args]
    name = type(expr).__name__
    if name in plain:
        return plain[name](*args)
    return expr.func(*args) if args else expr


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """base ** exponent, with -0.5 as the fraction it is: powers of sizes then combine exactly."""
    if (
        exponent.is_Float
        and (2 * exponent).is_integer is not False
        and float(2 * exponent).is_integer()
    ):
        exponent = sympy.Rational(int(2 * exponent), 2)
    return base**exponent


def scalar(V: Lookup, x: object) -> float | sympy.Expr | None:
    """The one number that `x` is: a scalar, or a tensor known to be constant."""
    if not isinstance(x, torch.Tensor):
        return number(x)
    term = V(x).term
    if not term.factors and not term.bound:
        return term.coef
    written = getattr(x, "constant", None)  # torch.tensor(1e-6), as a fake tensor remembers it
    if not isinstance(written, torch.Tensor) or written.numel() != 1:
        return None
    with _disable_current_modes():
        return number(written.item())
