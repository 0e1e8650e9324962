"""The language of feature maps: the text that the operators take for φ, and its parsed stages.

    text   = "" (identity) | stage " -> " stage …       applied in order, e.g. "2.0*x -> softmax"
    stage  = an expression in x, as sympy prints it     "Piecewise((x + 1, x > 0), (exp(x), True))"
           | "softmax"                                  over the features
           | "l2" | "l2(max=eps)" | "l2(add=eps)"       x/‖x‖, x/max(‖x‖, eps), x/(‖x‖ + eps)
           | "l1" …                                     the same with ‖x‖₁

An expression has numbers, pi, x, + - * / **, Piecewise with comparisons (joined by & and |), and
exp expm1 log log1p sqrt pow abs sign sigmoid tanh erf sin cos. Of the pieces the first whose
condition holds is taken; so the last, with True, is the one for NaN. The derivative is taken piece
by piece: where pieces meet it is that of the piece which the point belongs to.

Needs sympy for expressions, and imports it when it meets the first.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import sympy

__all__ = ["RowWise", "Stage", "canonical", "derivative", "has_rows", "parse", "text_of"]

_ROW = re.compile(r"(softmax|l1|l2)(?:\s*\(\s*(max|add)\s*=([^()]+)\))?")


@dataclass(frozen=True, slots=True)
class RowWise:
    """A step over the whole feature row.

    kind: "softmax", "l2" (x/‖x‖₂) or "l1" (x/‖x‖₁). guard: "max" for max(‖x‖, eps), "add" for
    ‖x‖ + eps; without an eps they are the same, and the guard is "max".
    """

    kind: str
    eps: float = 0.0
    guard: str = "max"

    def __str__(self) -> str:
        return f"{self.kind}({self.guard}={self.eps!r})" if self.eps else self.kind


Stage: TypeAlias = "sympy.Expr | RowWise"


@functools.cache
def parse(text: str) -> tuple[Stage, ...]:
    """The stages that `text` names, () for the identity; ValueError if it is not in the
    language.
    """
    stages = [_stage(part.strip()) for part in text.split("->")] if text.strip() else []
    return tuple(s for s in stages if isinstance(s, RowWise) or s != _x())


def text_of(stages: Sequence[Stage]) -> str:
    """The text for `stages`, which parses to the same stages."""
    return " -> ".join(str(s) if isinstance(s, RowWise) else _printer().doprint(s) for s in stages)


@functools.cache
def canonical(text: str) -> str:
    """One text for all that are read alike."""
    return text_of(parse(text))


@functools.cache
def has_rows(text: str) -> bool:
    """Whether a stage of the map looks at a whole row; "" is the identity."""
    return bool(text) and any(isinstance(stage, RowWise) for stage in parse(text))


@functools.cache
def derivative(stage: sympy.Expr) -> sympy.Expr:
    """d stage / d x, piece by piece."""
    return _accurate(stage.diff(_x()))


@functools.cache
def _x() -> sympy.Symbol:
    import sympy

    return sympy.Symbol("x", real=True)


def _stage(text: str) -> Stage:
    row = _ROW.fullmatch(text)
    if row is None:
        return _accurate(_Reader(text).expression())
    kind, guard, eps = row.groups()
    if guard is None:
        return RowWise(kind)
    if kind == "softmax":
        raise ValueError(f"feature map stage {text!r}: softmax takes no eps.")
    try:
        value = float(eps)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"feature map stage {text!r}: {eps.strip()!r} is not a finite number.")
    return RowWise(kind, value, guard if value else "max")


class _Reader:
    """Reads one expression from Python's syntax tree, and nothing that is not in the language."""

    def __init__(self, text: str) -> None:
        from bla_inductor.ops.elementary import FUNCTIONS

        self._text, self._functions = text, FUNCTIONS

    def expression(self) -> Any:
        import sympy

        try:
            tree = ast.parse(self._text, mode="eval").body
        except SyntaxError as error:
            raise self._error(f"it is not an expression ({error.msg})") from None
        try:
            expr = self._read(tree)
        except TypeError:  # sympy's, for a number where a condition stands, or the reverse
            raise self._error("conditions and values are mixed up") from None
        if not isinstance(expr, sympy.Expr):
            raise self._error("it is a condition, not a value")
        if expr.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo, sympy.I):
            raise self._error("a constant in it is not a finite real number")
        return expr

    def _error(self, why: str) -> ValueError:
        return ValueError(
            f"feature map stage {self._text!r}: {why}. A stage is an expression in x with numbers, "
            f"+ - * / **, Piecewise and {', '.join(self._functions)}; or softmax, l1, l2, "
            "l2(max=eps), l2(add=eps)."
        )

    def _read(self, node: ast.AST) -> Any:
        import sympy

        match node:
            case ast.Name(id="x"):
                return _x()
            case ast.Name(id="pi"):
                return sympy.pi
            case ast.Name(id="E"):
                return sympy.E
            case ast.Constant(value=bool(value)):
                return sympy.true if value else sympy.false
            case ast.Constant(value=int(value)):
                return sympy.Integer(value)
            case ast.Constant(value=float(value)):
                return sympy.Float(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._read(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._read(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(op, self._read(left), self._read(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(op, self._read(left), self._read(right))
            case ast.Call(func=ast.Name(id="Piecewise"), args=pairs, keywords=[]) if pairs:
                return self._pieces(pairs)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._call(name, args)
        raise self._error(f"{ast.unparse(node)!r} is not in the language")

    def _call(self, name: str, args: Sequence[ast.expr]) -> Any:
        if name not in self._functions:
            raise self._error(f"{name} is not in the language")
        operands = [self._read(a) for a in args]
        try:
            return self._functions[name](*operands)
        except TypeError:
            raise self._error(f"{name} does not take {len(args)} arguments") from None
        except ValueError as error:
            raise self._error(str(error)) from None

    def _binary(self, op: ast.operator, a: Any, b: Any) -> Any:
        import sympy

        match op:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div():
                return a / b
            case ast.Pow() if b.is_number:
                return self._functions["pow"](a, b)
            case ast.Pow() if a.is_number and a > 0:
                return a**b
            case ast.Pow():
                raise self._error(
                    "a power needs a number as its exponent, or a positive one as its base"
                )
            case ast.BitAnd():
                return sympy.And(a, b)
            case ast.BitOr():
                return sympy.Or(a, b)
        raise self._error(f"the operator {type(op).__name__} is not in the language")

    def _compare(self, op: ast.cmpop, a: Any, b: Any) -> Any:
        match op:
            case ast.Lt():
                return a < b
            case ast.LtE():
                return a <= b
            case ast.Gt():
                return a > b
            case ast.GtE():
                return a >= b
        raise self._error("conditions compare with < <= > >=")

    def _pieces(self, pairs: Sequence[ast.expr]) -> Any:
        import sympy

        pieces: list[tuple[Any, Any]] = []
        for pair in pairs:
            if not isinstance(pair, ast.Tuple) or len(pair.elts) != 2:
                raise self._error("Piecewise takes pairs (value, condition)")
            value, condition = (self._read(e) for e in pair.elts)
            if condition == sympy.true:
                return sympy.Piecewise(*pieces, (value, True), evaluate=False) if pieces else value
            if condition != sympy.false:
                pieces.append((value, condition))
        raise self._error("the condition of the last piece is not True")


def _accurate(expr: Any) -> Any:
    """The same function, in the forms that lose no digits and do not overflow: log1p, expm1 and
    sigmoid, and elu(x) + 1 as exp(x) below zero.
    """
    import sympy

    from bla_inductor.ops.elementary import Expm1, Log, Log1p, Sigmoid

    def inside(e: Any) -> Any:
        """A constant that is added to a Piecewise, or multiplies it, moved into the pieces."""
        (piecewise, *others) = [a for a in e.args if a.free_symbols]
        if others or not piecewise.is_Piecewise:
            return e
        constants = e.func(*(a for a in e.args if a is not piecewise))
        pieces = [(e.func(constants, value), c) for value, c in piecewise.args]
        return sympy.Piecewise(*pieces, evaluate=False)

    def logarithm(log: Any) -> Any:
        (u,) = log.args
        return Log1p(u - 1) if u.is_Add and sympy.Integer(1) in u.args else log

    def reciprocal(power: Any) -> Any:
        u, n = power.base - 1, power.exp
        return Sigmoid(-u.args[0]) ** -n if isinstance(u, sympy.exp) and n.is_Integer else power

    def difference(total: Any) -> Any:
        constant, rest = total.as_coeff_Add()
        for term in sympy.Add.make_args(rest):
            coef, factor = term.as_coeff_Mul()
            if constant == -coef and isinstance(factor, sympy.exp):
                return total - constant - term + coef * Expm1(factor.args[0])
        return total

    def quotient(product: Any) -> Any:
        for factor in product.args:
            if isinstance(factor, sympy.exp):
                u = factor.args[0]
                if Sigmoid(-u) in product.args:
                    return product / factor / Sigmoid(-u) * Sigmoid(u)
        return product

    expr = expr.replace(Expm1, lambda u: sympy.exp(u) - 1)
    expr = expr.replace(lambda e: (e.is_Add or e.is_Mul) and e.free_symbols, inside)
    expr = expr.replace(lambda e: isinstance(e, Log), logarithm)
    expr = expr.replace(lambda e: e.is_Pow and e.exp.is_negative, reciprocal)
    expr = expr.replace(lambda e: e.is_Add, difference)
    return expr.replace(lambda e: e.is_Mul, quotient)


@functools.cache
def _printer() -> Any:
    from sympy.printing.str import StrPrinter

    class Printer(StrPrinter):
        def _print_Float(self, expr: Any) -> str:
            return repr(float(expr))  # all digits: sympy prints 15

        def _print_Abs(self, expr: Any) -> str:
            return f"abs({self._print(expr.args[0])})"

    return Printer()
