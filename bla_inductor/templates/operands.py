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

from bla_inductor.ops.layout import READ_ALONG_TOKENS
from bla_inductor.templates import Unsupported

Node: TypeAlias = Any
Expr: TypeAlias = Any

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


def in_tiles(name: str, x: Node) -> Node:
    """x realized, for a kernel to read in tiles. Unsupported unless its features are contiguous and
    all rows begin at multiples of 16 bytes: `kernels.batch.aligned` has the reason, and makes the
    copy. There 16 bytes are not enough, since Triton knows of an argument
    that 16 divides it, or nothing; in a template strides are numbers, or expressions with a number
    as a factor.
    """
    x = realized(x)
    layout = x.get_layout()
    V.graph.sizevars.guard_int(layout.size[-1])  # the kernels are compiled for it

    def aligned(elements: Expr) -> bool:
        offset = sympy.sympify(elements * layout.dtype.itemsize)
        return bool(V.graph.sizevars.statically_known_multiple_of(offset, 16))

    pairs = zip(layout.size, layout.stride, strict=True)
    wide = [equal(size, 1) or aligned(stride) for size, stride in pairs]
    features = contiguous(x, -1) and all(wide[:-1])
    tokens = READ_ALONG_TOKENS and contiguous(x, -2) and all(wide[:-2]) and wide[-1]
    if tokens:
        tokens = bool(V.graph.sizevars.statically_known_multiple_of(layout.size[-2], 8))
    if not aligned(layout.offset) or not (features or tokens):
        raise Unsupported(
            f"{name} has strides {list(layout.stride)}: the features are not contiguous, or the "
            "rows not aligned, so it is copied first"
        )
    return x


def contiguous(x: Node, dim: int) -> bool:
    """Whether x is known to be contiguous along a dim."""
    return equal(x.get_layout().stride[dim], 1)


def in_columns(*nodes: Node | None) -> bool:
    """COLUMNS of the kernels: every tile is read along its features."""
    return all(x is None or contiguous(x, -1) for x in nodes)


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
        groups = _merge(sizes, [node for node, _ in given.values()])
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
            return repr(int(value) if value.is_integer else float(value))
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


def _merge(
    sizes: Sequence[Expr], nodes: Sequence[Node]
) -> tuple[tuple[Expr, list[Expr]], tuple[Expr, list[Expr]]]:
    """(size, stride of each node) of the outer and of the inner batch dim."""
    merged: list[tuple[Expr, list[Expr]]] = []
    for i, size in enumerate(sizes):
        if equal(size, 1):
            continue
        strides = [0 if equal(x.get_size()[i], 1) else x.get_stride()[i] for x in nodes]
        if merged and all(equal(a, b * size) for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        raise Unsupported(
            f"the batch dims {list(sizes)} have strides that do not merge into two dims"
        )
    while len(merged) < 2:
        merged.insert(0, (1, [0] * len(nodes)))
    return merged[0], merged[1]
