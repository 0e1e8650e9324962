"""The layout of what a forward keeps for its backward.

Inductor gives 4-D tensors that lead to a convolution the layout that convolutions like, "channels
last". It stops at `bmm`, but not at an operator it does not know: of (batch, heads, tokens,
features) heads would become innermost, and q, k, v and the state be copied to be kept, and copied
again to be read. So they are given the layout in which the kernels read them, in the same place
where Inductor notes the strides of the results that the user sees.

Where features are outside of tokens (images, channels first), the kernels read a copy in both
directions: what is kept is that copy, but for the graph's inputs, which stay alive anyway. Static
sizes only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from bla_inductor.failures import warn_once
from bla_inductor.ops.layout import dense_order, dense_strides
from bla_inductor.ops.schema import linear_attention_forward
from bla_inductor.slices import NO_VIEW, VIEWS, is_static, permutation, value

__all__ = ["keep_layouts"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

_OTHER_VIEWS = (
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_VISIBLE, _STRIDES = "user_visible_output_idxs", "original_output_strides"


def keep_layouts(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Settle the strides of results of `graph` that our operators read or write; how many."""
    operators = graph.find_nodes(op="call_function", target=linear_attention_forward)
    operators = [n for n in operators if value(n.args[0]).device.type == device_type]
    if not operators:
        return 0
    output = graph.output_node()
    if not {_VISIBLE, _STRIDES} <= output.meta.keys():
        return 0
    try:
        last = _lays_channels_last(graph)
        wanted = {n: s for o in operators for n, s in _wanted(o, last)}
    except Exception as error:
        warn_once(log, "Inductor chooses the layout of what is kept for the backward", error)
        return 0
    results: Any = output.args[0]
    visible, strides = list(output.meta[_VISIBLE]), list(output.meta[_STRIDES])
    shown = {results[i] for i in visible}
    settled = [i for i, n in enumerate(results) if n in wanted and n not in shown]
    for i in settled:
        strides[i] = wanted[results[i]]
    output.meta |= {_VISIBLE: visible + settled, _STRIDES: strides}
    return len(settled)


def _lays_channels_last(graph: fx.Graph) -> bool:
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    return module is not None and GraphLowering.decide_layout_opt(module, is_inference=False)


def _wanted(operator: fx.Node, channels_last: bool) -> Iterator[tuple[fx.Node, tuple[int, ...]]]:
    """The operator's tensors, and what they are views and copies of (the backward of a softmax
    reads its result beside the gradient), each with its strides.
    """
    results = [user for user in operator.users if user.target is getitem]
    for x in [*results, *operator.args[:5]]:
        if not isinstance(x, fx.Node) or not is_static(x) or 0 in value(x).stride():
            continue
        if channels_last and (views := _of_convolution(x)):
            yield from views
            continue
        order = dense_order(value(x)) if _is_given(x) else _order(x, channels_last)
        while True:
            t = value(x)
            same = _longer(t, order) == _longer(t, dense_order(t))
            yield x, t.stride() if same else tuple(dense_strides(t.shape, order))
            if x.target is aten.permute.default:
                order = [permutation(x)[d] for d in order]
            elif x.target in VIEWS and (inside := _with_ones(x, order)):
                order = inside
            elif x.target is not aten.clone.default or _is_given(x.all_input_nodes[0]):
                break
            x = x.all_input_nodes[0]


def _of_convolution(x: fx.Node) -> list[tuple[fx.Node, tuple[int, ...]]]:
    """x, and what it is a view of, down to the result of a convolution of images with its channels
    last, each with its strides there; nothing where x is no such view.
    """
    nodes = [x]
    while (node := nodes[-1]).target in (*VIEWS, *_OTHER_VIEWS, *_SPLITS, getitem):
        nodes.append(node.all_input_nodes[0])
    image = nodes.pop()
    if image.target is not aten.convolution.default or value(image).dim() != 4:
        return []
    laid: Any = torch.empty(value(image).shape, device="meta", memory_format=torch.channels_last)
    found = []
    for node in reversed(nodes):
        apply: Any = aten.view.default if node.target in VIEWS else node.target
        try:
            laid = apply(laid, *node.args[1:], **node.kwargs)
        except NO_VIEW:  # a copy
            return []
        if isinstance(laid, Tensor):
            found.append((node, laid.stride()))
    return found


def _is_given(x: fx.Node) -> bool:
    """Whether x is a view of an input of the graph."""
    while x.target in (*VIEWS, *_OTHER_VIEWS):
        x = x.all_input_nodes[0]
    return x.op == "placeholder"


def _order(x: fx.Node, channels_last: bool) -> list[int]:
    """The dims of an operand or result, outermost first, features last."""
    t = value(x)
    features = t.dim() - 1
    if channels_last and t.dim() == 4 and t.stride(features) != 1:
        return [0, 2, 1, features]  # a convolution's result is then one of tokens by channels
    return [*(d for d in dense_order(t) if d != features), features]


def _longer(t: Tensor, dims: Sequence[int]) -> list[int]:
    """Those of more than one element: other dims have a stride, and no place in memory."""
    return [d for d in dims if t.shape[d] != 1]


def _with_ones(view: fx.Node, order: Sequence[int]) -> list[int]:
    """`order` of the dims of `view` as one of what it views, where only dims of one element come or
    go (a batch of one, which bmm does without); else nothing.
    """
    after, before = value(view), value(view.all_input_nodes[0])
    kept, there = _longer(after, range(after.dim())), _longer(before, range(before.dim()))
    if [after.shape[d] for d in kept] != [before.shape[d] for d in there]:
        return []
    ones = [d for d in range(before.dim()) if d not in there]
    return ones + [there[kept.index(d)] for d in order if d in kept]
