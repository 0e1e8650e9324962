"""Copies around the backward operator that the kernels make needless.

- Autograd writes the gradient that comes in as `contiguous` views of something: the kernels read
  any strides, so they are given what was copied.
- Gradients of q, k and v that go through a feature map before they are joined (`stack`, then
  `permute` and `contiguous`, the backward of `qkv.reshape(b, n, 3, c).permute(…).unbind()`) are
  joined in the final layout, instead of being joined and copied. Where nothing is between, the
  kernels write the joined tensor themselves (packing.py).

Both change where numbers are, and none of them. Static sizes only.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from bla_inductor.ops.layout import readable
from bla_inductor.ops.packed import linear_attention_backward_packed
from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.slices import (
    VIEWS,
    Inexpressible,
    descendants,
    is_static,
    moved,
    to_contiguous,
    value,
)
from bla_inductor.undo import warned_on_failure

__all__ = ["remove_copies"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

_OPERATORS = (linear_attention_backward, linear_attention_backward_packed)
_COALESCED = 64  # bytes in a row that a part of the joined tensor has at least, to be written well


def remove_copies(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite `graph`, whose nodes have their fake value as meta["val"]; how many copies went."""
    operators = [n for o in _OPERATORS for n in graph.find_nodes(op="call_function", target=o)]
    operators = [n for n in operators if value(n.args[0]).device.type == device_type]
    if not operators:
        return 0
    with warned_on_failure(graph, log, "copies around the backward stay"):
        removed = sum(_read_what_was_copied(node) for node in operators)
        after = descendants(operators)
        cats = graph.find_nodes(op="call_function", target=aten.cat.default)
        removed += sum(_join_in_place(node) for node in cats if node in after)
        if removed:
            graph.eliminate_dead_code()
            graph.lint()
        return removed
    return 0


def _read_what_was_copied(operator: fx.Node) -> int:
    incoming: Any = operator.args[0]
    source = _copied(incoming)
    if source is None or not readable(value(source)):
        return 0
    operator.update_arg(0, source)
    return 1


def _copied(node: fx.Node) -> fx.Node | None:
    """What `node`, views of a `clone`, is a copy of, element by element."""
    copy = node
    while copy.target in VIEWS:
        copy = copy.args[0]  # type: ignore[assignment]
    if copy.target is not aten.clone.default:
        return None
    source: Any = copy.args[0]
    # Views of a tensor that lead back to its own shape leave every element where it was.
    same = value(source).shape == value(node).shape and value(source).dtype == value(node).dtype
    return source if same and is_static(source, node) else None


def _join_in_place(cat: fx.Node) -> int:
    """`cat`, views, `clone` become the `cat` of the parts' views, along the dim it ends up in."""
    views, end = to_contiguous(cat)
    arguments: Any = cat.args
    tensors, dim = arguments[0], arguments[1] if len(arguments) > 1 else 0
    if end is cat or not is_static(end, *tensors):
        return 0
    dim %= value(cat).dim()
    try:
        ways = [moved(cat, views, dim, *own) for own in _ranges(tensors, dim)]
    except Inexpressible as error:
        log.debug("%s is joined and copied: %s", cat, error)
        return 0
    last = ways[0].dim
    run = value(end).stride(last) * value(end).element_size()
    if any(way.dim != last or way.length * run < _COALESCED for way in ways):
        return 0
    graph = cat.graph
    with graph.inserting_before(end):
        parts = []
        for tensor, way in zip(tensors, ways, strict=True):
            part = tensor
            for view, shape in zip(views, way.shapes, strict=True):
                part = _again(graph, view, part, shape)
            parts.append(part)
        joined = graph.call_function(aten.cat.default, (parts, last))
        joined.meta = dict(end.meta)
    end.replace_all_uses_with(joined)
    return 1


def _ranges(tensors: list[fx.Node], dim: int) -> list[tuple[int, int]]:
    """(start, length) of every part."""
    lengths = [int(value(tensor).shape[dim]) for tensor in tensors]
    return list(zip(accumulate(lengths, initial=0), lengths, strict=False))


def _again(graph: fx.Graph, view: fx.Node, x: fx.Node, shape: list[int]) -> fx.Node:
    """`view` of a part, whose result has `shape`."""
    if view.target is aten.permute.default:
        made = graph.call_function(aten.permute.default, (x, view.args[1]))
        made.meta = {**view.meta, "val": value(x).permute(view.args[1])}  # type: ignore[arg-type]
    else:
        made = graph.call_function(aten.reshape.default, (x, shape))
        made.meta = {**view.meta, "val": value(x).reshape(shape)}
    return made
