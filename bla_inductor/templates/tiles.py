"""Operands in memory as the kernels read them, in tiles of tokens by features.

The counterpart of `kernels.batch.aligned`. What Inductor is still to compute it is told to write in
a layout that suits, so that the change costs nothing; what is in memory already (inputs, results of
convolutions and GEMMs) it copies, in a loop that fuses with what comes before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import sympy
from torch._inductor import ir
from torch._inductor import lowering as inductor
from torch._inductor.virtualized import V

from bla_inductor.ops.layout import ROW, dense_strides
from bla_inductor.templates import Unsupported
from bla_inductor.templates.arguments import hint
from bla_inductor.templates.operands import Expr, Node, equal, merges, realized


def in_tiles(name: str, x: Node) -> Node:
    """x in memory, its features contiguous and all rows at multiples of 16 bytes: a view of its
    buffer where that is possible, else a copy.

    `kernels.batch.aligned` has the reason. There 16 bytes are not enough, since Triton knows of an
    argument that 16 divides it, or nothing; in a template strides are numbers, or expressions with
    a number as a factor. Unsupported where dense rows are no multiples of 16 bytes.
    """
    x = x if isinstance(x, ir.TensorBox) else ir.TensorBox(x)
    features = V.graph.sizevars.guard_int(x.get_size()[-1])  # the kernels are compiled for it
    x.realize()
    base = _computed(x)
    flexible = None if base is None else base.layout
    orders = [] if base is None else list(_orders(base))
    first = view = _view(x)
    if _suits(view):
        return view
    if features * x.get_dtype().itemsize % ROW:
        raise Unsupported(
            f"{name} has rows of {features} × {x.get_dtype()}, no multiple of {ROW} bytes: it is "
            "copied into longer ones first"
        )
    if base is not None and flexible is not None:
        for order in orders:
            base.layout = flexible.as_exact_strides(dense_strides(base.get_size(), order))
            view = _view(x)
            if _suits(view):
                return view
        base.layout = flexible
    return _copied(x, first)


def dense(x: Node) -> Node:
    """x in memory without gaps, its dims in their order: itself or a copy. Inductor may have kept
    it for the backward in an order of its own.
    """
    x = realized(x)
    strides = zip(x.get_stride(), ir.FlexibleLayout.contiguous_strides(x.get_size()), strict=True)
    if all(equal(size, 1) or equal(*s) for size, s in zip(x.get_size(), strides, strict=True)):
        return x
    return _copied(ir.TensorBox(x), None)


def over_batch(
    sizes: Sequence[Expr], nodes: Mapping[str, Node | None], state: Sequence[Expr]
) -> dict[str, Node | None]:
    """The nodes, those copied whose batch dims stand in the way of merging `sizes` into two.

    state: the batch of the dense states that are read or written beside them.
    """
    dense = state, ir.FlexibleLayout.contiguous_strides(state)
    if merges(sizes, list(nodes.values()), [dense]):
        return dict(nodes)
    return {name: node and _with_dense_batch(sizes, node) for name, node in nodes.items()}


def _with_dense_batch(sizes: Sequence[Expr], x: Node) -> Node:
    """A node whose batch dims follow each other in memory: itself, or a copy."""
    own = [d for d in range(len(sizes)) if not equal(x.get_size()[d], 1)]
    strides = x.get_stride()
    if all(equal(strides[a], strides[b] * x.get_size()[b]) for a, b in pairwise(own)):
        return x
    return _copied(ir.TensorBox(x), None)


def _computed(x: Node) -> Node | None:
    """The buffer that x is a view of, if a loop of Inductor's writes it whose layout is open."""
    while isinstance(x, ir.MutableBox | ir.BaseView):
        x = x.data
    is_open = isinstance(x, ir.ComputedBuffer) and isinstance(x.layout, ir.FlexibleLayout)
    return x if is_open else None


def _view(x: Node) -> Node | None:
    """x as a strided view of its buffer, whose layout is final then; None if it is no such view."""
    node = x.data
    try:
        if isinstance(node, ir.BaseView):
            if not ir.is_storage_and_layout(node.unwrap_view()):
                return None
            node = ir.ExternKernel.convert_to_reinterpret_view(node)
        storage, layout = ir.as_storage_and_layout(node, freeze=True)
    except NotImplementedError:
        return None
    return ir.ReinterpretView(data=storage, layout=layout)


def _suits(x: Node | None) -> bool:
    if x is None:
        return False
    layout = x.get_layout()

    def aligned(elements: Expr) -> bool:
        offset = sympy.sympify(elements * layout.dtype.itemsize)
        return bool(V.graph.sizevars.statically_known_multiple_of(offset, ROW))

    *outer, (_, innermost) = zip(layout.size, layout.stride, strict=True)
    return (
        equal(innermost, 1)
        and aligned(layout.offset)
        and all(equal(size, 1) or aligned(stride) for size, stride in outer)
    )


def _orders(base: Node) -> Iterator[list[int]]:
    """Orders of a buffer's dims, outermost first: the one that its reads ask for, with each dim
    moved to the end.
    """
    order = list(reversed(base.get_fill_order() or list(reversed(range(len(base.get_size()))))))
    for last in reversed(order):
        yield [d for d in order if d != last] + [last]


def _copied(x: Node, view: Node | None) -> Node:
    """A dense copy of x: in the order of `view`, x in memory, but for the features; or contiguous.

    Batch dims that repeat memory are copied once.
    """
    sizes = list(x.get_size())
    batch = range(len(sizes) - 2)
    stride = sizes if view is None else view.get_stride()
    repeated = [d for d in batch if view is not None and equal(stride[d], 0)]
    order = list(range(len(sizes)))
    if view is not None:
        order[:-1] = sorted(order[:-1], key=lambda d: -hint(stride[d]))
    for d in repeated:
        x = inductor.slice_(x, d, 0, 1)
    copy = ir.ExternKernel.copy_input(x)
    strides = dense_strides(copy.get_size(), order)
    storage, layout = ir.as_storage_and_layout(copy, freeze=True, exact_strides=strides)
    strides = [0 if d in repeated else layout.stride[d] for d in range(len(sizes))]
    layout = ir.FixedLayout(layout.device, layout.dtype, sizes, strides, layout.offset)
    return ir.ReinterpretView(data=storage, layout=layout)
