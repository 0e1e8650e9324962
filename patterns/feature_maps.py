"""φ, read off the graph: the pointwise and row-wise steps between a tensor and its use in a
product.

A feature map is a list of stages, applied in order: a pointwise function of one real variable held
as a sympy expression, or a row-wise step over the feature index (softmax, L2 norm). Walking back
from an operand, every parameter-free pointwise operator is composed into the expression; what has
parameters,
or mixes positions, is where φ ends: that tensor is the operand and nothing is lost.

Examples: elu(x) + 1 (Katharopoulos et al. 2020), relu(x) + eps, softmax over features (Shen et al.
2018), x·sigmoid(x), L2-normalised relu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from bla_inductor.algebra import Axes, Factor, Index, Inexpressible, Leaf, Read, Term, Value
from bla_inductor.algebra.index import refine
from bla_inductor.algebra.registry import number
from bla_inductor.compat import clamp_is_flat_at_its_bounds
from bla_inductor.ops.elementary import Absolute, Log, Power, Sigmoid, Sqrt
from bla_inductor.ops.feature_map import RowWise, Stage, canonical, text_of

__all__ = ["FeatureMap", "RowWise", "X", "capture"]

aten = torch.ops.aten
X = sympy.Symbol("x", real=True)
_HALF = sympy.Rational(1, 2)
_MOST_STAGES = 8


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """`stages` applied in order to the tensor `leaf`, laid out as `axes`, give the operand."""

    leaf: Leaf
    axes: Axes
    stages: tuple[Stage, ...]

    @property
    def identity(self) -> bool:
        return not self.stages

    @property
    def text(self) -> str:
        """As the operators take it."""
        return canonical(text_of(self.stages))

    def __str__(self) -> str:
        return " → ".join(_text(s) for s in self.stages) or "x"


def _text(stage: Stage) -> str:
    if isinstance(stage, sympy.Piecewise):
        pieces = [f"{sympy.sstr(e)} where {sympy.sstr(c)}" for e, c in stage.args[:-1]]
        return ", ".join([*pieces, f"else {sympy.sstr(stage.args[-1][0])}"])
    return str(stage)


def capture(factors: Sequence[Factor], features: Sequence[Index]) -> FeatureMap | None:
    """The feature map of a product of factors whose feature indices are `features`.

    None where the product does not come from one tensor of the graph.
    """
    term = Term(tuple(factors))
    stages: list[Stage] = []
    best: FeatureMap | None = None
    for _ in range(_MOST_STAGES):
        found = _compose(term, named=True) or _compose(term, named=False)
        if found is not None:
            leaf, axes, expr = found
            if expr != X:
                stages.insert(0, expr)
            if leaf.node is not None:
                best = FeatureMap(leaf, axes, tuple(stages))
            term = Term((Read(leaf, axes, leaf.dtype),))
        row = _softmax(term, features) or _normalised(term, features)
        if row is None:
            break
        stage, term = row
        stages.insert(0, stage)
    return best


def _compose(term: Term, named: bool) -> tuple[Leaf, Axes, sympy.Expr] | None:
    """coef · Π φᵢ(x)^pᵢ over one leaf x; with `named`, x is the result of a graph node."""
    if term.bound or not term.factors:
        return None
    coef = term.coef
    if not isinstance(coef, int | float):
        return None
    expr: sympy.Expr = sympy.Integer(1) if coef == 1 else sympy.Float(coef)
    base: tuple[Leaf, Axes] | None = None
    for factor in term.factors:
        if not isinstance(factor, Read):
            return None
        traced = _trace(factor, named)
        if traced is None:
            return None
        leaf, axes, inner = traced
        if base is None:
            base = leaf, axes
        elif base != (leaf, axes):
            return None
        expr = expr * inner**factor.power
    assert base is not None
    return *base, expr


def _trace(read: Read, named: bool) -> tuple[Leaf, Axes, sympy.Expr] | None:
    """One factor as a function of the tensor at the bottom of its pointwise chain."""
    leaf, origin = read.leaf, read.leaf.origin
    here = (leaf, read.axes, X) if leaf.node is not None or not named else None
    if origin is None:
        return here
    values = [a for a in origin.args if isinstance(a, Value) and a.term.factors]
    if len(values) != 1 or any(isinstance(v, Value) for _, v in origin.kwargs):
        return here
    (inner,) = values
    function = (lambda x: x) if origin.operator is None else _function(origin)
    if function is None or len(inner.axes) != len(read.axes):
        return here
    try:
        placed = _placed(inner, read.axes)
    except Inexpressible:
        return here
    below = _compose(placed, named)
    if below is None:
        return here
    base, axes, expr = below
    return base, axes, function(expr)


def _placed(value: Value, axes: Axes) -> Term:
    """The term of `value` in the indices of `axes`, which the same tensor's reader uses."""
    value = value.fresh()
    for dim, axis in enumerate(axes):
        if value.axes[dim]:
            _, mapping = refine(axis, value.axes[dim])
            value = value.substitute(mapping)
            if value.axes[dim] != axis:
                raise Inexpressible("read in other pieces than it was made in")
    return value.term


def _function(origin: Any) -> Callable[[sympy.Expr], sympy.Expr] | None:
    """The operator as a function of its one tensor argument, its numbers filled in."""
    make = POINTWISE.get(origin.operator)
    if make is None:
        return None
    slots = [None if isinstance(a, Value) and a.term.factors else _constant(a) for a in origin.args]
    kwargs = dict(origin.kwargs)

    def function(x: sympy.Expr) -> sympy.Expr:
        args = [
            x if isinstance(a, Value) and a.term.factors else s
            for a, s in zip(origin.args, slots, strict=True)
        ]
        return make(*args, **kwargs)

    try:
        function(X)
    except (TypeError, ValueError):  # a keyword or a mode that the table does not know
        return None
    return function


def _constant(argument: Any) -> Any:
    if isinstance(argument, Value):
        return _plain(argument.term.coef)
    value = number(argument)
    return argument if value is None else _plain(value)


def _plain(value: Any) -> Any:
    """Whole numbers as integers: x**2, not x**2.0."""
    if isinstance(value, float) and value.is_integer():
        return sympy.Integer(int(value))
    return sympy.Float(value) if isinstance(value, float) else value


def _softmax(term: Term, features: Sequence[Index]) -> tuple[RowWise, Term] | None:
    """A softmax over exactly the feature indices, and what it is of."""
    (read, *others) = term.factors
    if others or not isinstance(read, Read) or (origin := read.leaf.origin) is None:
        return None
    if origin.operator is not aten._softmax:
        return None
    value, dim = origin.args[0], origin.args[1]
    if set(read.axes[dim % len(read.axes)]) != set(features):
        return None
    try:
        return RowWise("softmax"), _placed(value, read.axes)
    except Inexpressible:
        return None


def _normalised(term: Term, features: Sequence[Index]) -> tuple[RowWise, Term] | None:
    """x / ‖x‖ over the feature indices, with the guard that the norm has; and x."""
    if len(term.factors) == 1 and isinstance(read := term.factors[0], Read):
        origin = read.leaf.origin
        if origin is None or origin.operator is not None or read.power != 1:
            return None
        try:
            term = _placed(origin.args[0], read.axes)
        except Inexpressible:
            return None
    reads = [f for f in term.factors if isinstance(f, Read)]
    below = [f for f in reads if f.power == -1]
    if len(below) != 1 or len(reads) != len(term.factors) or term.bound:
        return None
    rest = Term(tuple(f for f in reads if f is not below[0]), (), term.coef)
    norm = _norm_of(below[0], features)
    if norm is None:
        return None
    stage, inner = norm
    same = _compose(inner, named=True) == _compose(rest, named=True) is not None
    return (stage, inner) if same else None


def _norm_of(read: Read, features: Sequence[Index]) -> tuple[RowWise, Term] | None:
    """The stage that divides by this norm, L1 or L2 with its guard, and what the norm is of."""
    eps, guard, origin = 0.0, "max", read.leaf.origin
    if origin is not None and origin.operator in (aten.clamp_min, aten.clamp, aten.add):
        guard = "add" if origin.operator is aten.add else "max"
        args, kwargs = origin.args, dict(origin.kwargs)
        bound = number(args[1] if len(args) > 1 else kwargs.pop("min", None))
        factors = args[0].term.factors
        if not isinstance(bound, float) or len(factors) != 1 or not isinstance(factors[0], Read):
            return None
        if kwargs or args[2:]:  # an upper bound as well, or a factor of eps
            return None
        eps, origin = bound, factors[0].leaf.origin
    if origin is None or origin.operator is not aten.linalg_vector_norm:
        return None
    value, order, dims = (*origin.args, 2, None)[:3] if len(origin.args) < 3 else origin.args[:3]
    kind = {1.0: "l1", 2.0: "l2"}.get(number(order) or 0.0)
    if kind is None or not isinstance(dims, Sequence) or len(dims) != 1:
        return None
    dim = dims[0] % len(value.axes)
    spread = tuple(tuple(features) if d == dim else a for d, a in enumerate(read.axes))
    try:
        return RowWise(kind, eps, guard if eps else "max"), _placed(value, spread)
    except Inexpressible:
        return None


def _piecewise(*pieces: tuple[Any, Any]) -> sympy.Expr:
    return sympy.Piecewise(*pieces)


def _elu(x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> sympy.Expr:
    return _piecewise((scale * x, x > 0), (scale * alpha * (sympy.exp(input_scale * x) - 1), True))


def _gelu(x: Any, *, approximate: str = "none") -> sympy.Expr:
    if approximate == "tanh":
        inner = sympy.sqrt(2 / sympy.pi) * (x + sympy.Float(0.044715) * x**3)
        return x * (1 + sympy.tanh(inner)) / 2
    return x * (1 + sympy.erf(x / sympy.sqrt(2))) / 2


def _clamp(x: Any, low: Any = None, high: Any = None, **kw: Any) -> sympy.Expr:
    """NaN stays, and a value at a bound has the derivative that this torch gives it."""
    low, high = kw.get("min", low), kw.get("max", high)
    if low is not None and high is not None and low >= high:
        return sympy.sympify(high)
    flat = clamp_is_flat_at_its_bounds()
    pieces = [] if low is None else [(low, x <= low if flat else x < low)]
    pieces += [] if high is None else [(high, x >= high if flat else x > high)]
    return _piecewise(*pieces, (x, True))


def _hardtanh(x: Any, low: Any = -1, high: Any = 1) -> sympy.Expr:
    """A clamp whose derivative at the bounds is 0."""
    return _piecewise((low, x <= low), (high, x >= high), (x, True))


def _softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> sympy.Expr:
    return _piecewise((x, beta * x > threshold), (Log(1 + sympy.exp(beta * x)) / beta, True))


def _plus(x: Any, y: Any, *, alpha: Any = 1) -> sympy.Expr:
    return x + alpha * y


def _power(x: Any, y: Any) -> sympy.Expr:
    """x ** y, of which one is a number."""
    if isinstance(y, sympy.Expr) and not y.is_number:
        if not x > 0:
            raise ValueError("a negative base")
        return x**y
    return Power(x, y)


# The piece with True is the one that NaN falls into, so it is one that depends on x.
POINTWISE: dict[Any, Callable[..., sympy.Expr]] = {
    aten.relu: lambda x: _piecewise((0, x <= 0), (x, True)),
    aten.elu: _elu,
    aten.exp: sympy.exp,
    aten.exp2: lambda x: 2**x,
    aten.expm1: lambda x: sympy.exp(x) - 1,
    aten.log: Log,
    aten.log1p: lambda x: Log(1 + x),
    aten.sigmoid: Sigmoid,
    aten.silu: lambda x: x * Sigmoid(x),
    aten.gelu: _gelu,
    aten.tanh: sympy.tanh,
    aten.erf: sympy.erf,
    aten.sin: sympy.sin,
    aten.cos: sympy.cos,
    aten.leaky_relu: lambda x, slope=0.01: _piecewise((x, x > 0), (slope * x, True)),
    aten.softplus: _softplus,
    aten.abs: Absolute,
    aten.sqrt: Sqrt,
    aten.rsqrt: lambda x: 1 / Sqrt(x),
    aten.square: lambda x: x**2,
    aten.pow: _power,
    aten.reciprocal: lambda x: 1 / x,
    aten.neg: lambda x: -x,
    aten.add: _plus,
    aten.sub: lambda x, y, alpha=1: x - alpha * y,
    aten.rsub: lambda x, y, alpha=1: y - alpha * x,
    aten.mul: lambda x, y: x * y,
    aten.div: lambda x, y: x / y,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.hardtanh: _hardtanh,
    aten.hardsigmoid: lambda x: _piecewise((0, x <= -3), (1, x >= 3), (x / 6 + _HALF, True)),
    aten.hardswish: lambda x: _piecewise((0, x <= -3), (x, x >= 3), (x * (x + 3) / 6, True)),
}
