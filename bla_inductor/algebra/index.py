"""Index variables and the arithmetic of their sizes.

An axis of a tensor is a tuple of indices, major first: `(b, h)` is an axis of size `b.size *
h.size` that somebody merged, and `()` an axis of size one. Two axes describe the same thing when
they refine to the same indices. A size is a Python int, or a sympy expression where the graph is
symbolic; the shape environment is only read, for the guards that it has, so nothing here can
install one.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch

__all__ = [
    "Axes",
    "Axis",
    "Index",
    "Inexpressible",
    "Size",
    "Substitution",
    "as_size",
    "axis_size",
    "equal",
    "product",
    "quotient",
    "refine",
    "reshape_axes",
    "substitute_axes",
]

Size: TypeAlias = int | sympy.Expr
_numbers = itertools.count()


class Inexpressible(Exception):
    """The layout operation cannot be said in indices (an uneven split, say): its result is a new
    leaf.
    """


class Index:
    """One index variable; compared by identity. `name` is for people."""

    __slots__ = ("number", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.number = next(_numbers)

    def __repr__(self) -> str:
        return f"i{self.number}:{self.size}"


Axis = tuple[Index, ...]
Axes = tuple[Axis, ...]
Substitution = Mapping[Index, Axis]


def as_size(value: int | torch.SymInt) -> Size:
    """A size as an int or a sympy expression, without specialising a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    expr, env = value.node.expr, value.node.shape_env
    if env is None:
        return _canonical(expr)
    known, told = _guarded(env)
    if expr not in told:
        told[expr] = _told(expr, known)
    return told[expr]


_Known: TypeAlias = dict[sympy.Expr, sympy.Expr]
_equalities: weakref.WeakKeyDictionary[Any, tuple[int, _Known, dict[sympy.Expr, Size]]]
_equalities = weakref.WeakKeyDictionary()


def _guarded(env: Any) -> tuple[_Known, dict[sympy.Expr, Size]]:
    """What symbols, floor divisions and sums with one are equal to, each in simpler words, by the
    guards that there are; and the sizes that have been told by that.

    Torch itself rewrites only symbols: where a batch of matrices needed that dim // head_dim is 1,
    or another tensor's quotient, it has the guard and still tells the size as it was.
    """
    seen, known, told = _equalities.get(env, (0, {}, {}))
    before = len(known)
    for guard in env.guards[seen:]:
        if isinstance(guard.expr, sympy.Eq):
            terms = (_told(env.replace(side), known) for side in guard.expr.args)
            sides = {sympy.sympify(size) for size in terms}
            simple, other = min(sides, key=_length), max(sides, key=_length)
            plain = other.is_Symbol and (simple.is_Symbol or simple.is_Integer)
            divided = any(_is_division(term) for term in sympy.Add.make_args(other))
            if simple not in (other, 0) and (plain or divided):
                known[other] = simple
    if len(known) > before:
        told = {}
    _equalities[env] = len(env.guards), known, told
    return known, told


def _told(expr: sympy.Expr, known: Mapping[sympy.Expr, sympy.Expr]) -> Size:
    size = _canonical(expr)
    while known and not isinstance(size, int) and (simpler := size.xreplace(known)) != size:
        size = _canonical(simpler)
    return size


def _length(expr: sympy.Expr) -> tuple[bool, int, str]:
    return not expr.is_Integer, expr.count_ops(), str(expr)


def _is_division(expr: sympy.Expr) -> bool:
    return type(expr).__name__ in ("FloorDiv", "CleanDiv")


@lru_cache(maxsize=4096)
def _canonical(expr: sympy.Expr) -> Size:
    """Floor divisions that are exact, as torch's own reshapes write them, as quotients."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol or not expr.args:
        return expr
    args = [_canonical(a) for a in expr.args]
    if _is_division(expr):
        exact = quotient(*args)
        if exact is not None:
            return exact
    return expr.func(*args)


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def axis_size(axis: Axis) -> Size:
    return product(index.size for index in axis)


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal; False when it cannot be told."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _difference_vanishes(sympy.sympify(a), sympy.sympify(b))


@lru_cache(maxsize=4096)
def _difference_vanishes(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b is known to divide a, else None. A size of zero divides nothing."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a > 0 and a % b == 0 else None
    return _symbolic_quotient(sympy.sympify(a), sympy.sympify(b))


@lru_cache(maxsize=4096)
def _symbolic_quotient(a: sympy.Expr, b: sympy.Expr) -> Size | None:
    if b == 0:
        return None
    ratio = sympy.expand(a) / sympy.expand(b)
    if isinstance(ratio, sympy.Mul) and any(isinstance(f, sympy.Add) for f in ratio.args):
        ratio = sympy.factor_terms(ratio)
    ratio = sympy.expand(ratio)
    if ratio.is_Integer:
        return int(ratio)
    terms = sympy.Add.make_args(ratio)
    whole = all(t.as_numer_denom()[1] == 1 and t.as_coeff_Mul()[0].is_Integer for t in terms)
    return ratio if whole and not ratio.is_Number else None


def substitute_axes(axes: Axes, mapping: Substitution) -> Axes:
    return tuple(tuple(j for i in axis for j in mapping.get(i, (i,))) for axis in axes)


def refine(a: Axis, b: Axis) -> tuple[dict[Index, Axis], dict[Index, Axis]]:
    """Substitutions for `a` and for `b` that turn both axes into one and the same tuple of indices.

    Indices of `a` are kept where they can be, so that the first substitution is often empty.
    Raises Inexpressible when the sizes do not split evenly, as 4·6 against 8·3 does not.
    """
    to_a: dict[Index, list[Index]] = {i: [] for i in a}
    to_b: dict[Index, list[Index]] = {i: [] for i in b}
    left = [(i, i.size) for i in reversed(a)]
    right = [(i, i.size) for i in reversed(b)]
    while left and right:
        p, p_size = left.pop()
        q, q_size = right.pop()
        if equal(p_size, q_size):
            shared = p if not to_a[p] and equal(p_size, p.size) else Index(p_size)
        elif (rest := quotient(p_size, q_size)) is not None:
            shared = Index(q_size)
            left.append((p, rest))
        elif (rest := quotient(q_size, p_size)) is not None:
            shared = p if not to_a[p] and equal(p_size, p.size) else Index(p_size)
            right.append((q, rest))
        else:
            raise Inexpressible(f"sizes {p_size} and {q_size} do not split evenly")
        to_a[p].append(shared)
        to_b[q].append(shared)
    if left or right:
        raise Inexpressible("axes of different sizes")
    return (
        {i: tuple(new) for i, new in to_a.items() if new != [i]},
        {i: tuple(new) for i, new in to_b.items()},
    )


def reshape_axes(axes: Axes, shape: Sequence[Size]) -> tuple[Axes, dict[Index, Axis]]:
    """The axes of `view(shape)`, and the indices that had to be split for it."""
    pending = [i for axis in axes for i in axis][::-1]
    split: dict[Index, Axis] = {}
    result = []
    for size in shape:
        axis: list[Index] = []
        need: Size = size
        while not equal(need, 1):
            if not pending:
                raise Inexpressible("the view has more elements than its input")
            index = pending.pop()
            if (rest := quotient(need, index.size)) is not None:
                axis.append(index)
                need = rest
            elif (rest := quotient(index.size, need)) is not None:
                major, minor = Index(need), Index(rest)
                split = {
                    i: substitute_axes((new,), {index: (major, minor)})[0]
                    for i, new in split.items()
                }
                split[index] = (major, minor)
                axis.append(major)
                pending.append(minor)
                need = 1
            else:
                raise Inexpressible(f"an axis of size {index.size} does not split into {need}")
        result.append(tuple(axis))
    if pending:
        raise Inexpressible("the view has fewer elements than its input")
    return tuple(result), split
