"""Operands of a kernel in Inductor's IR: every tensor as a view of two batch dims and its own two.

The counterpart of `bla_inductor.kernels.batch` for sizes and strides that may be symbolic. Absent
tensors have the first operand's pointer and strides of 0, as the kernels expect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.triton import texpr
from torch._inductor.virtualized import V

from bla_inductor.templates import Unsupported

Node: TypeAlias = Any
Expr: TypeAlias = Any
View: TypeAlias = tuple[Sequence[Expr], Sequence[Expr]]  # sizes and strides

_SIZES = "SIZES"


def equal(a: Expr, b: Expr) -> bool:
    """Whether a and b are known to be equal, without a guard."""
    return bool(V.graph.sizevars.statically_known_equals(a, b))


def less(a: Expr, b: Expr) -> bool:
    """Whether a is known to be less than b, without a guard."""
    return bool(V.graph.sizevars.statically_known_lt(a, b))


def realized(x: Node) -> Node:
    """x in memory, its layout final: a view of its buffer where that is possible, else a copy."""
    x = ir.ExternKernel.realize_input(x)
    storage, layout = ir.as_storage_and_layout(x, freeze=True)
    return ir.ReinterpretView(data=storage, layout=layout)


class Operands:
    """The operands of one kernel.

    tensors: name in the kernel's text → (node, how many dims are its own, 1 or 2) or None. `sizes`
    are those of the batch, which the dims before the own ones broadcast to. Unsupported where three
    batch dims have unrelated strides.
    """

    def __init__(
        self, sizes: Sequence[Expr], tensors: Mapping[str, tuple[Node, int] | None]
    ) -> None:
        given = {name: pair for name, pair in tensors.items() if pair is not None}
        groups = _merge(sizes, [(x.get_size(), x.get_stride()) for x, _ in given.values()])
        if groups is None:
            raise Unsupported(
                f"the batch dims {list(sizes)} have strides that do not merge into two dims"
            )
        self.views: dict[str, Node] = {}
        for i, (name, (node, own)) in enumerate(given.items()):
            layout = node.get_layout()
            size, stride = list(layout.size[-own:]), list(layout.stride[-own:])
            if own == 1:
                size, stride = [*size, 1], [*stride, 0]
            (outer, outer_strides), (inner, inner_strides) = groups
            self.views[name] = ir.ReinterpretView(
                data=node.data,
                layout=ir.FixedLayout(
                    layout.device,
                    layout.dtype,
                    [outer, inner, *size],
                    [outer_strides[i], inner_strides[i], *stride],
                    layout.offset,
                ),
            )
        self._first = next(iter(given))
        self._sizes: list[Expr] = []
        self.count = groups[0][0] * groups[1][0]

    @property
    def nodes(self) -> dict[str, Node]:
        """What the template is given, by the names in its text.

        A template can name sizes of its inputs only: what else its text needs (`expression`) are
        the sizes of one more view of the first operand, which nobody reads.
        """
        if not self._sizes:
            return self.views
        layout = self.views[self._first].get_layout()
        none = [0] * len(self._sizes)
        layout = ir.FixedLayout(layout.device, layout.dtype, self._sizes, none, layout.offset)
        view = ir.ReinterpretView(data=self.views[self._first].data, layout=layout)
        return {**self.views, _SIZES: view}

    def expression(self, value: Expr) -> str:
        """A number or an expression in symbolic sizes, as text."""
        value = sympy.sympify(value)
        symbols = sorted(value.free_symbols, key=str)
        if not symbols:
            text = repr(int(value) if value.is_integer else float(value))
            return text if value.is_finite else f'float("{text}")'
        names = sympy.symbols(f"size_:{len(symbols)}_", integer=True, positive=True)
        text = texpr(value.xreplace(dict(zip(symbols, names, strict=True))))
        for symbol, name in zip(symbols, names, strict=True):
            if symbol not in self._sizes:
                self._sizes.append(symbol)
            text = text.replace(str(name), self.size(_SIZES, self._sizes.index(symbol)))
        return f"({text})"

    @property
    def device(self) -> torch.device:
        return self.views[self._first].get_device()

    @property
    def inner(self) -> str:
        """The size of the inner batch dim, as text."""
        return self.size(self._first, 1)

    def pointer(self, name: str) -> str:
        return name if name in self.views else self._first

    def size(self, name: str, dim: int) -> str:
        return f'({{{{size("{name}", {dim})}}}})'

    def strides(self, name: str, count: int = 4) -> str:
        """The first `count` of the two batch strides and the tensor's own, as text."""
        if name not in self.views:
            return ", ".join(["0"] * count)
        return ", ".join(f'{{{{stride("{name}", {i})}}}}' for i in range(count))

    def big(self, rows: int) -> bool:
        """Whether an offset within a tile of `rows` may leave int32."""
        reach = (
            rows * view.get_stride()[2] + 256 * view.get_stride()[3] for view in self.views.values()
        )
        return not all(less(r, 2**31) for r in reach)


def merges(
    sizes: Sequence[Expr], nodes: Sequence[Node | None], beside: Sequence[View] = ()
) -> bool:
    """Whether one kernel can take the nodes (those that are there), and views beside them."""
    views = [(x.get_size(), x.get_stride()) for x in nodes if x is not None]
    return _merge(sizes, [*views, *beside]) is not None


def _merge(
    sizes: Sequence[Expr], views: Sequence[View]
) -> tuple[tuple[Expr, list[Expr]], tuple[Expr, list[Expr]]] | None:
    """(size, stride of each view) of the outer and of the inner batch dim."""
    merged: list[tuple[Expr, list[Expr]]] = []
    for i, size in enumerate(sizes):
        if equal(size, 1):
            continue
        strides = [0 if equal(own[i], 1) else stride[i] for own, stride in views]
        if merged and all(equal(a, b * size) for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, [0] * len(views)))
    return merged[0], merged[1]
