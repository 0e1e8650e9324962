"""Gradients that the graph puts together again are written together.

Where q, k and v are parts of one projection's output, autograd joins dq, dk and dv into the
gradient of the whole: by `cat` (of `chunk`, `split` and `unbind`) or as a sum of `select_scatter`
and `slice_scatter` into zeros (of indexing). Inductor makes that a pass over all three, which costs
nearly as much traffic as the backward itself. The kernels write any strides, so here the joined
tensor becomes a result of the backward operator, in the layout of the `contiguous` that follows it,
if one does.

Where only some of the parts are gradients of ours (keys that go through a softmax first), these are
written into the joined tensor by the kernels, and the others by `written_into`, which fuses with
what computes them. Only where nothing else reads the gradients, and all sizes are static.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from bla_inductor.ops.packed import linear_attention_backward_packed, written_into
from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.slices import (
    LAYOUT,
    Inexpressible,
    is_static,
    moved,
    only_user,
    to_contiguous,
    undone,
    value,
    way,
)
from bla_inductor.undo import warned_on_failure

__all__ = ["pack_gradients"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

_LIBRARIES = (
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
)
_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)


@dataclass
class _Part:
    """A gradient's way into the joined tensor: views and copies, then [start, start + length) of
    dim `dim`.

    entry: the node that joins it. drops: the dim is not one of the gradient's (`select_scatter`).
    """

    number: int
    gradient: fx.Node
    views: list[fx.Node]
    entry: fx.Node
    dim: int
    start: int
    length: int
    drops: bool = False


def pack_gradients(graph: fx.Graph, device_type: str = "cuda", partly: bool = False) -> int:
    """Rewrite `graph`, whose nodes have their fake value as meta["val"]; how many were packed.

    partly: those that are joined with what others compute, where all that is left of the join is a
    `cat` in the final layout (copies.py).
    """
    nodes = graph.find_nodes(op="call_function", target=linear_attention_backward)
    if not nodes:
        return 0
    with warned_on_failure(graph, log, "gradients are joined by a copy"):
        nodes = [n for n in nodes if value(_args(n)[0]).device.type == device_type]
        packed = sum(_pack(n, partly) for n in nodes)
        if packed:
            graph.eliminate_dead_code()
            graph.lint()
        return packed
    return 0


def _pack(node: fx.Node, partly: bool) -> bool:
    tensors = [value(t) for t in _args(node)[:7] if isinstance(t, fx.Node)]
    shapes = [t.shape[: _args(node)[1].meta["val"].dim() - 2] for t in tensors[1:4]]
    if not all(isinstance(s, int) for t in tensors for s in t.shape) or len(set(shapes)) > 1:
        return False
    users = {_args(u)[1]: u for u in node.users if u.target is getitem}
    parts = [part for i, u in users.items() if (part := _part(i, u)) is not None]
    joined = {id(_top(part)): _top(part) for part in parts}
    for top in joined.values():
        own = [part for part in parts if _top(part) is top]
        if _is_some(top, own) if partly else len(own) > 1 and _is_all(top, own):
            try:
                end, places = _end_and_places(top, own)
            except Inexpressible as error:
                log.debug("gradients of %s are joined by a copy: %s", node, error)
                continue
            if partly and end is not top:
                continue
            joined_by_kernels = _rewrite(node, users, end, own, places)
            if partly:
                _fill(joined_by_kernels, top, own)
            return True
    return False


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _part(number: int, gradient: fx.Node) -> _Part | None:
    views, user = way(gradient)
    node = views[-1] if views else gradient
    if user is None:
        return None
    if user.target is aten.cat.default:
        tensors, dim = _args(user)[0], _args(user)[1] if len(_args(user)) > 1 else 0
        if tensors.count(node) > 1:
            return None
        dim = dim % value(user).dim()
        before = tensors[: tensors.index(node)]
        start = sum(value(t).shape[dim] for t in before)
        return _Part(number, gradient, views, user, dim, start, value(node).shape[dim])
    if user.target in _SCATTERS and _args(user)[1] is node and _is_zero(_args(user)[0]):
        return _scattered(number, gradient, views, user)
    return None


def _scattered(number: int, gradient: fx.Node, views: list[fx.Node], user: fx.Node) -> _Part | None:
    names = ("dim", "start", "end", "step")
    given = [*_args(user)[2:], *(user.kwargs[n] for n in names if n in user.kwargs)]
    dim = int(given[0]) if given else 0
    dim %= value(user).dim()
    size = value(user).shape[dim]
    if user.target is aten.select_scatter.default:
        index = int(_args(user)[3])
        return _Part(number, gradient, views, user, dim, index % size, 1, drops=True)
    start, end, step = (*given[1:], *(None, None, None)[len(given) - 1 :])[:3]
    if step not in (None, 1):
        return None
    first = int(start or 0)
    last = size if end is None else min(int(end), size)
    if first < 0 or last < 0:
        return None
    return _Part(number, gradient, views, user, dim, first, last - first)


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.full.default:
        return False
    return bool(_args(node)[1] == 0)


def _top(part: _Part) -> fx.Node:
    """The joined tensor: the `cat`, or the last of the sums of scattered parts."""
    node = part.entry
    if node.target is aten.cat.default:
        return node
    while (user := only_user(node)) is not None and user.target is aten.add.Tensor:
        if user.kwargs:
            break
        node = user
    return node


def _is_all(top: fx.Node, parts: Sequence[_Part]) -> bool:
    """Whether the parts make up the joined tensor, each element once."""
    if len({part.dim for part in parts}) > 1:
        return False
    if {value(part.gradient).dtype for part in parts} != {value(top).dtype}:
        return False
    end = 0
    for part in sorted(parts, key=lambda p: p.start):
        if part.start != end:
            return False
        end += part.length
    entries = {part.entry for part in parts}
    leaves = {top} if top.target is aten.cat.default else _summands(top)
    return end == value(top).shape[parts[0].dim] and leaves == entries


def _is_some(top: fx.Node, parts: Sequence[_Part]) -> bool:
    """Whether the joined tensor is a `cat` of the parts, and of others, that will be in memory: a
    loop that reads it would compute the others where it reads them.
    """
    if top.target is not aten.cat.default or not _is_read_in_memory(top):
        return False
    tensors = _args(top)[0]
    same = {value(t).dtype for t in tensors} == {value(top).dtype}
    return same and is_static(top, *tensors)


def _is_read_in_memory(node: fx.Node) -> bool:
    views = (u for u in node.users if u.target in LAYOUT)
    return any(u.target in _LIBRARIES for u in node.users) or any(map(_is_read_in_memory, views))


def _fill(joined: fx.Node, cat: fx.Node, parts: Sequence[_Part]) -> None:
    """Write what is no gradient of ours to its place in `joined`, which `cat` gave way to."""
    graph, dim, start = cat.graph, parts[0].dim, 0
    own = {part.start for part in parts if part.length}
    readers, node = list(joined.users), joined
    with graph.inserting_before(cat):
        for tensor in _args(cat)[0]:
            length = value(tensor).shape[dim]
            if start not in own and length:
                node = graph.call_function(written_into, (node, tensor, dim, start))
                node.meta = dict(joined.meta)
            start += length
    for reader in readers:
        reader.replace_input_with(joined, node)


def _summands(node: Any) -> set[fx.Node]:
    if isinstance(node, fx.Node) and node.target is aten.add.Tensor:
        return _summands(_args(node)[0]) | _summands(_args(node)[1])
    return {node}


def _end_and_places(top: fx.Node, parts: Sequence[_Part]) -> tuple[fx.Node, list[list[int]]]:
    """The tensor to write, the joined one or a `contiguous` of it, and where its parts are."""
    after, end = to_contiguous(top)
    try:
        return end, [_place(part, top, after, end) for part in parts]
    except Inexpressible:
        return top, [_place(part, top, [], top) for part in parts]


def _rewrite(
    node: fx.Node,
    users: dict[Any, fx.Node],
    end: fx.Node,
    parts: Sequence[_Part],
    places: Sequence[Sequence[int]],
) -> fx.Node:
    numbers = [part.number for part in parts]
    empty = value(_args(node)[1]).new_empty(0)
    values = [empty if i in numbers else v for i, v in enumerate(node.meta["val"])]
    joined = value(end).new_empty(value(end).shape)
    graph = node.graph
    with graph.inserting_before(node):
        packed = graph.call_function(
            linear_attention_backward_packed,
            _args(node),
            {
                **node.kwargs,
                "size": list(joined.shape),
                "places": [n for place in places for n in place],
            },
        )
        packed.meta = {**node.meta, "val": (joined, *values)}
        first = graph.call_function(getitem, (packed, 0))
        first.meta = {**end.meta, "val": joined}
        for i, user in users.items():
            if i not in numbers:
                user.args = (packed, i + 1)
    end.replace_all_uses_with(first)
    return first


def _place(part: _Part, top: fx.Node, after: Sequence[fx.Node], end: fx.Node) -> list[int]:
    """[number, offset, strides] of the gradient in the memory of `end`."""
    place = moved(top, after, part.dim, part.start, part.length)
    own = [part.length if d == part.dim else s for d, s in enumerate(value(top).shape)]
    shapes = [own, *place.shapes]
    strides = torch.empty(value(end).shape, device="meta").stride()
    x = torch.empty_strided(shapes.pop(), strides, device="meta")
    for view in reversed(after):
        x = undone(view, x, shapes.pop())
    if part.drops:
        x = x.squeeze(part.dim)
    for view in reversed(part.views):
        x = undone(view, x, value(_args(view)[0]).shape)
    assert x.shape == value(part.gradient).shape
    return [part.number, place.start * strides[place.dim], *x.stride()]
