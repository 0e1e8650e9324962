"""The functions of one real variable from which feature maps are built, as sympy functions.

sympy's own `sqrt`, `log` and `Abs` simplify as the real line allows: exp(log(x)) becomes x and
sqrt(x)² becomes x, which forgets the NaN of a negative x; and its derivative of a sigmoid written
as 1/(1 + exp(-x)) overflows where the sigmoid does not. These stay as they are written, and their
derivatives are those that torch uses. exp, erf, tanh, sin and cos are sympy's.
"""

from __future__ import annotations

from typing import Any

import sympy

__all__ = ["FUNCTIONS", "Absolute", "Expm1", "Log", "Log1p", "Power", "Sigmoid", "Sign", "Sqrt"]


class _Elementary(sympy.Function):
    """A function with a name of its own in the text of a feature map."""

    nargs = (1,)
    is_real = True  # of a real argument in its domain
    name: str

    def _sympystr(self, printer: Any) -> str:
        return f"{self.name}({', '.join(printer._print(a) for a in self.args)})"

    @classmethod
    def eval(cls, *args: Any) -> Any:
        (u,) = args
        return cls._constant(u) if u.is_number else None

    @classmethod
    def _constant(cls, u: Any) -> Any:
        raise NotImplementedError


class Sqrt(_Elementary):
    name = "sqrt"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return sympy.sqrt(u) if u >= 0 else sympy.nan

    def fdiff(self, argindex: int = 1) -> Any:
        return 1 / (2 * self)


class Log(_Elementary):
    name = "log"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return sympy.log(u) if u > 0 else sympy.nan if u < 0 else -sympy.oo

    def fdiff(self, argindex: int = 1) -> Any:
        return 1 / self.args[0]


class Log1p(_Elementary):
    """log(1 + u), exact for small u."""

    name = "log1p"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return Log(1 + u)

    def fdiff(self, argindex: int = 1) -> Any:
        return 1 / (1 + self.args[0])


class Expm1(_Elementary):
    """exp(u) - 1, exact for small u."""

    name = "expm1"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return sympy.exp(u) - 1

    def fdiff(self, argindex: int = 1) -> Any:
        return sympy.exp(self.args[0])


class Sigmoid(_Elementary):
    """1 / (1 + exp(-u)); its derivative does not overflow."""

    name = "sigmoid"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return 1 / (1 + sympy.exp(-u))

    def fdiff(self, argindex: int = 1) -> Any:
        return self * (1 - self)


class Absolute(_Elementary):
    name = "abs"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return sympy.Abs(u)

    def fdiff(self, argindex: int = 1) -> Any:
        return Sign(self.args[0])


class Sign(_Elementary):
    """0 at 0, so that |u| has the derivative 0 there, as in torch."""

    name = "sign"

    @classmethod
    def _constant(cls, u: Any) -> Any:
        return sympy.sign(u)

    def fdiff(self, argindex: int = 1) -> Any:
        return sympy.Integer(0)


class Power(_Elementary):
    """u ** y for a number y that is neither whole nor half: NaN for u < 0."""

    name = "pow"
    nargs = (2,)

    @classmethod
    def eval(cls, *args: Any) -> Any:
        u, y = args
        if not y.is_number:
            raise ValueError(f"the exponent {y} is not a number")
        if not y.is_number:
            raise ValueError(f"the exponent {y} is not a number")
        number = float(y)
        if number.is_integer():
            return u ** int(number)
        if (2 * number).is_integer():
            return Sqrt(u) ** int(2 * number)
        if u.is_number:
            return u**y if u >= 0 else sympy.nan
        return None

    def fdiff(self, argindex: int = 1) -> Any:
        u, y = self.args
        return y * Power(u, y - 1)


FUNCTIONS = {
    "exp": sympy.exp,
    "erf": sympy.erf,
    "tanh": sympy.tanh,
    "sin": sympy.sin,
    "cos": sympy.cos,
    **{f.name: f for f in (Sqrt, Log, Log1p, Expm1, Sigmoid, Absolute, Sign, Power)},
}
