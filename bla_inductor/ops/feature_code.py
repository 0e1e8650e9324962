"""Straight-line code for the stages of a feature map, in the words of a dialect.

The operator's plain path (torch) and the kernels (Triton) compute φ and φ' from the same stages by
the same walk; a dialect only says how one operation is written. Equal operations are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from bla_inductor.ops.feature_map import RowWise, Stage, derivative

__all__ = ["Writer"]


class Writer:
    """Collects lines `t0 = …`; the methods take and give operands: names, or literals.

    A dialect gives `functions`, the word for each function of the language but `pow`, and the
    methods that raise NotImplementedError here.
    """

    functions: ClassVar[Mapping[str, str]]

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def let(self, text: str) -> str:
        """The name of the value of `text`."""
        if text not in self._names:
            self._names[text] = f"t{len(self._names)}"
            self.lines.append(f"{self._names[text]} = {text}")
        return self._names[text]

    def where(self, condition: str, a: str, b: str) -> str:
        raise NotImplementedError

    def power(self, u: str, exponent: str) -> str:
        """u ** exponent, for a number that is neither whole nor half."""
        raise NotImplementedError

    def exponential(self, base: str, u: str) -> str:
        """base ** u, for a positive number."""
        raise NotImplementedError

    def row(self, stage: RowWise, x: str) -> str:
        raise NotImplementedError

    def row_gradient(self, stage: RowWise, x: str, y: str, g: str) -> str:
        raise NotImplementedError

    def piece(self, x: str, taken: Sequence[str], passed: Sequence[str]) -> str:
        """x as one piece reads it; the piece is used where `taken` hold and `passed` do not."""
        return x

    def forward(self, stages: Sequence[Stage], x: str) -> str:
        """φ(x)."""
        for stage in stages:
            x = self._stage(stage, x)
        return x

    def gradient(self, stages: Sequence[Stage], x: str, g: str) -> str:
        """The gradient of x, where g is that of φ(x)."""
        values = []
        for stage in stages:
            values.append(x)
            x = self._stage(stage, x) if len(values) < len(stages) else x
        for stage, value in zip(reversed(stages), reversed(values), strict=True):
            if isinstance(stage, RowWise):
                g = self.row_gradient(stage, value, self.row(stage, value), g)
            else:
                g = self._times_slope(derivative(stage), value, g)
        return g

    def _stage(self, stage: Stage, x: str) -> str:
        return self.row(stage, x) if isinstance(stage, RowWise) else self.expression(stage, x)

    def _times_slope(self, slope: Any, x: str, g: str) -> str:
        """g · slope(x), where 0 means 0 whatever g is: torch selects there, and does not
        multiply.
        """
        if slope == 0:
            return "0.0"
        if slope == 1:
            return g
        if not slope.is_Piecewise:
            return self.let(f"{g} * {self.expression(slope, x)}")
        return self._pieces(slope, x, lambda value, own: self._times_slope(value, own(x), own(g)))

    def expression(self, e: Any, x: str) -> str:
        """e with x for its symbol."""
        if not e.free_symbols:
            return _literal(e)
        if e.is_Symbol:
            return x
        if e.is_Piecewise:
            return self._pieces(e, x, lambda value, own: self.expression(value, own(x)))
        if e.is_Add:
            return self._sum(e, x)
        if e.is_Mul or (e.is_Pow and e.exp.is_negative):
            return self._product(e, x)
        if e.is_Pow:
            base, exponent = e.args
            if base.free_symbols:
                return self._whole_power(self.expression(base, x), int(exponent))
            return self.let(self.exponential(_literal(base), self.expression(exponent, x)))
        name = getattr(e, "name", e.func.__name__)
        operands = [self.expression(a, x) for a in e.args]
        if name == "pow":
            return self.let(self.power(*operands))
        return self.let(f"{self.functions[name]}({', '.join(operands)})")

    def _sum(self, e: Any, x: str) -> str:
        added: list[Any] = []
        subtracted: list[Any] = []
        for term in e.as_ordered_terms():
            coef, rest = term.as_coeff_Mul()
            negative = coef.is_negative and rest.free_symbols
            (subtracted if negative else added).append(-term if negative else term)
        first = [self.expression(t, x) for t in added] or ["0.0"]
        text = " + ".join(first)
        return self.let(" - ".join([text, *(self.expression(t, x) for t in subtracted)]))

    def _product(self, e: Any, x: str) -> str:
        coef, rest = e.as_independent(*e.free_symbols, as_Add=False)
        above, below = [], []
        for factor in rest.as_ordered_factors():
            if factor.is_Pow and factor.exp.is_negative and factor.base.free_symbols:
                below.append(self.expression(factor.base**-factor.exp, x))
            else:
                above.append(self.expression(factor, x))
        if float(coef) != 1.0 or not above:
            above.insert(0, _literal(coef))
        product = above[0] if len(above) == 1 else self.let(" * ".join(above))
        if not below:
            return product
        divisor = below[0] if len(below) == 1 else self.let(" * ".join(below))
        return self.let(f"{product} / {divisor}")

    def _whole_power(self, u: str, n: int) -> str:
        result = ""
        while n:
            if n & 1:
                result = self.let(f"{result} * {u}") if result else u
            n >>= 1
            if n:
                u = self.let(f"{u} * {u}")
        return result

    def _pieces(self, e: Any, x: str, write: Callable[[Any, Callable[[str], str]], str]) -> str:
        """Every piece as `write` makes it, which is given how to read an operand in that piece."""
        conditions = [self._condition(c, x) for _, c in e.args[:-1]]
        values = []
        for i, (value, _) in enumerate(e.args):
            simple = value.is_Symbol or not value.free_symbols
            reader = _unchanged if simple else self._reader(conditions[i : i + 1], conditions[:i])
            values.append(write(value, reader))
        result = values.pop()
        for condition, value in zip(reversed(conditions), reversed(values), strict=True):
            result = self.let(self.where(condition, value, result))
        return result

    def _reader(self, taken: Sequence[str], passed: Sequence[str]) -> Callable[[str], str]:
        return lambda operand: self.piece(operand, taken, passed)

    def _condition(self, c: Any, x: str) -> str:
        if c.is_Relational:
            a, b = (self.expression(side, x) for side in c.args)
            return self.let(f"{a} {c.rel_op} {b}")
        sign = {"And": " & ", "Or": " | "}[c.func.__name__]
        return self.let(sign.join(self._condition(part, x) for part in sorted(c.args, key=str)))


def _unchanged(operand: str) -> str:
    return operand


def _literal(value: Any) -> str:
    number = float(value)
    return repr(number) if number - number == 0 else f'float("{number!r}")'
