"""New nodes in a Dynamo graph.

Every node targets an OpOverload and carries `example_value`, else AOTAutogradCache does not take
the graph, and the stack trace of the node it replaces, so that errors and profiles still show the
user's line. If a plan turns out not to work, `undo` takes back all that was inserted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Mod, PythonMod

from bla_inductor.algebra import Axes, Axis, Index, Observation, Size, axis_size, equal
from bla_inductor.algebra.index import as_size

__all__ = ["Emitter", "Unemittable"]

aten = torch.ops.aten
_COPIED = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "fwd_nn_module_stack",
)
_ARITHMETIC: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    CleanDiv: operator.floordiv,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}


class Unemittable(Exception):
    """The plan cannot be said in the graph; the text is a reason for the report."""


class Emitter:
    """Inserts nodes before `root`."""

    def __init__(self, gm: fx.GraphModule, seen: Observation, root: fx.Node) -> None:
        self._graph, self._seen, self._root = gm.graph, seen, root
        self._new: list[fx.Node] = []
        self._fakes: dict[fx.Node, Any] = dict(seen.tensors)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, and what it computes on fake tensors; nothing is inserted if that fails."""
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), self.fake)
        result = target(*fake_args, **fake_kwargs)
        with self._graph.inserting_before(self._root):
            node = self._graph.call_function(target, args, kwargs)
        self._new.append(node)
        node.meta.update({k: self._root.meta[k] for k in _COPIED if k in self._root.meta})
        node.meta["example_value"] = self._fakes[node] = result
        return node

    def fake(self, node: fx.Node) -> Any:
        """The fake tensor (or symbolic number) that is the result of `node`."""
        if node in self._fakes:
            return self._fakes[node]
        return node.meta.get("example_value", node.meta.get("val"))

    def undo(self) -> None:
        for node in reversed(self._new):
            self._graph.erase_node(node)
        self._new.clear()

    def number(self, value: Any) -> Any:
        """A coefficient as an argument: a float, or a node that computes it from symbolic sizes."""
        if isinstance(value, int | float):
            return float(value)
        expr = sympy.sympify(value)
        if expr.is_number:
            return float(expr)
        return self._expression(expr)

    def size(self, size: Size) -> Any:
        """A size as an argument: an int, or a node."""
        if isinstance(size, int):
            return size
        return self._known_size(size) or self._expression(size)

    def _known_size(self, expr: sympy.Expr) -> fx.Node | None:
        """A symbolic integer of the graph, or the size of one of its tensors, that is `expr`."""
        limit = self._seen.position[self._root]
        for node, at in self._seen.position.items():
            if at >= limit:
                break
            known = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(known, torch.SymInt | torch.SymFloat) and known.node.expr == expr:
                return node
        for node, tensor in self._seen.tensors.items():
            if self._seen.position[node] >= limit:
                break
            for dim, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and as_size(size) == expr:
                    return self.call(aten.sym_size.int, node, dim)
        return None

    def _expression(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr.is_number:
            return float(expr)
        known = self._known_size(expr)
        if known is not None:
            return known
        if isinstance(expr, sympy.Pow):
            base, exponent = expr.args
            if exponent.is_negative:
                return self.call(operator.truediv, 1.0, self._expression(base**-exponent))
            power = int(exponent) if exponent.is_Integer else float(exponent)
            if power == 0.5:
                return self.call(torch.sym_sqrt, self._expression(base))
            return self.call(operator.pow, self._expression(base), power)
        combine = _ARITHMETIC.get(expr.func)
        if combine is None:
            raise Unemittable(
                f"the symbolic size {expr} is not the size of any tensor in the graph"
            )
        first, *rest = (self._expression(a) for a in expr.args)
        for other in rest:
            first = self.call(combine, first, other)
        return first

    def laid_out(self, node: fx.Node, axes: Axes, target: Axes, fill: Sequence[bool]) -> fx.Node:
        """`node`, which is laid out as `axes`, as `target`; views wherever they are possible.

        An index of `target` that `axes` has not becomes size one, or, where fill[i] for its axis,
        is expanded.
        """
        units = [unit for axis in axes for unit in _units(axis, target)]
        starts = {unit[0]: unit for unit in units}
        order = [starts[i] for axis in target for i in axis if i in starts]
        have = [i for unit in units for i in unit]
        if len(order) != len(units) or len(set(have)) != len(have):
            raise Unemittable("an operand has an axis of its own that the product does not have")
        flat = node
        if units != list(axes):
            flat = self.call(aten.reshape.default, node, [self.size(axis_size(u)) for u in units])
        if order != units:
            flat = self.call(aten.permute.default, flat, [units.index(unit) for unit in order])
        grown: list[Axis] = []
        for axis, full in zip(target, fill, strict=True):
            grown += [starts.get(i, (i,)) for i in axis if i in starts or (full and i not in have)]
        if grown != order:
            shape = [self.size(axis_size(unit)) for unit in grown]
            ones = [size if u in order else 1 for u, size in zip(grown, shape, strict=True)]
            flat = self.call(aten.reshape.default, flat, ones)
            flat = self.call(aten.expand.default, flat, shape)
        if grown != list(target):
            kept = [
                tuple(i for i in a if i in have or f) for a, f in zip(target, fill, strict=True)
            ]
            flat = self.call(aten.reshape.default, flat, [self.size(axis_size(a)) for a in kept])
        return flat

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if self.fake(node).dtype == dtype:
            return node
        return self.call(aten._to_copy.default, node, dtype=dtype)

    def same_layout(self, node: fx.Node, other: torch.Tensor) -> bool:
        """Whether `node` has the shape and the strides of `other` (where a size is not one)."""
        mine = self.fake(node)
        return mine.dim() == other.dim() and all(
            equal(as_size(a), as_size(b))
            and (equal(as_size(a), 1) or equal(_occupied(as_size(s)), _occupied(as_size(t))))
            for a, b, s, t in zip(
                mine.shape, other.shape, mine.stride(), other.stride(), strict=True
            )
        )


def _units(axis: Axis, target: Axes) -> list[Axis]:
    """What may stay one dim on the way from `axis` to `target`: all of it, where `target` has the
    same indices side by side, or each index.
    """
    n = len(axis)
    if any(other[at : at + n] == axis for other in target for at in range(len(other) - n + 1)):
        return [axis] if axis else []
    return [(i,) for i in axis]


def _occupied(stride: Size) -> Size:
    """A stride of a tensor that has elements. Torch tells contiguous ones as products of max(1,
    size), but not everywhere.
    """
    if isinstance(stride, int):
        return stride
    told = {m: sympy.Mul(*m.args) for m in stride.atoms(Max) if len(m.args) == 2 and 1 in m.args}
    return stride.xreplace(told)


def memory_order(tensor: torch.Tensor, hint: Callable[[Size], int]) -> list[int]:
    """The dims of `tensor`, outermost in memory first."""
    strides = [hint(as_size(s)) for s in tensor.stride()]
    return sorted(range(tensor.dim()), key=lambda i: (-strides[i], i))


def grouped(flat: Sequence[Index], groups: Mapping[str, Sequence[Index]]) -> dict[str, Axis]:
    """Each group's indices, in the order in which they stand in `flat`."""
    at = {index: i for i, index in enumerate(flat)}
    return {
        name: tuple(sorted(indices, key=lambda i: at.get(i, len(at))))
        for name, indices in groups.items()
    }
