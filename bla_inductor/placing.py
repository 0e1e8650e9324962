"""A gradient that the graph copies as a whole is written as the copy.

Autograd takes the layout of an operand for that of its gradient. Where what comes next is a
`contiguous` of views of it (a convolution's gradient with its channels last: `images.py`), Inductor
makes that a pass over memory. The kernels write any order of the dims, so here the operator is
asked for that of the copy, and the copy goes. Where there is no copy, they are asked for features
beside each other, which those of an image's channels are not. Gradients that are joined are
packing.py's. Static sizes only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from bla_inductor.ops.layout import dense_order
from bla_inductor.ops.packed import linear_attention_backward_packed
from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.slices import LAYOUT, Inexpressible, is_static, undone, value, way
from bla_inductor.undo import warned_on_failure

__all__ = ["place_gradients"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

_OPERATORS = ((linear_attention_backward, 0), (linear_attention_backward_packed, 1))


def place_gradients(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite `graph`, whose nodes have their fake value as meta["val"]; how many gradients lie
    otherwise.
    """
    operators = [
        (node, first)
        for target, first in _OPERATORS
        for node in graph.find_nodes(op="call_function", target=target)
        if value(node.args[0]).device.type == device_type
    ]
    if not operators:
        return 0
    with warned_on_failure(graph, log, "gradients are copied to where they are read"):
        placed = sum(_place(n, u, first) for n, first in operators for u in [*n.users])
        if placed:
            graph.lint()
        return placed
    return 0


def _place(operator: fx.Node, gradient: fx.Node, first: int) -> bool:
    """first: which result of the operator is dq."""
    number: Any = gradient.args[1] - first if gradient.target is getitem else -1  # type: ignore[operator]
    if not 0 <= number < 5 or not is_static(gradient):
        return False
    nodes = way(gradient)[0]
    while nodes and nodes[-1].target is not aten.clone.default:
        nodes.pop()
    written = _written(gradient, nodes) if nodes and is_static(*nodes) else None
    if written is not None:
        _ask_for(operator, gradient, number, dense_order(written))
        _without_copies(nodes)
        return True
    *outer, last = dense_order(value(gradient))
    features = value(gradient).dim() - 1
    if last == features or _is_result(gradient):
        return False
    order = [*(d for d in (*outer, last) if d != features), features]
    _ask_for(operator, gradient, number, order)
    return True


def _ask_for(operator: fx.Node, gradient: fx.Node, number: int, order: list[int]) -> None:
    """Have the kernels write a gradient with its dims in `order`, outermost first."""
    fake, rank = value(gradient), len(order)
    given: Any = operator.kwargs.get("orders")
    orders = [*(given or [*range(rank)] * 5)]
    orders[number * rank : (number + 1) * rank] = order
    operator.update_kwarg("orders", orders)
    memory = fake.new_empty([fake.shape[d] for d in order])
    gradient.meta["val"] = memory.permute([order.index(d) for d in range(rank)])


def _is_result(node: fx.Node) -> bool:
    """Whether users see a tensor, or a view of it, and so its strides."""
    views = (u for u in node.users if u.target in LAYOUT)
    return any(u.op == "output" for u in node.users) or any(map(_is_result, views))


def _written(gradient: fx.Node, nodes: Sequence[fx.Node]) -> Tensor | None:
    """The gradient as a view of the last of `nodes`, a copy, if it is one, and dense, with its
    features beside each other.
    """
    x = torch.empty(value(nodes[-1]).shape, device="meta")
    try:
        for node in reversed(nodes):
            source: Any = node.args[0]
            x = undone(node, x, value(source).shape)
    except Inexpressible as error:
        log.debug("%s is copied: %s", gradient, error)
        return None
    dense = x.stride(-1) == 1 and x.permute(dense_order(x)).is_contiguous()
    return x if dense else None


def _without_copies(nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        source: Any = node.args[0]
        if node.target is aten.clone.default:
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
        else:
            view: Any = node.target
            node.meta["val"] = view(value(source), *node.args[1:])
