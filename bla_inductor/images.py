"""Gradients on their way into a convolution, channels last where the convolution is.

Inductor lays images out with their channels last around convolutions, but until torch 2.13 asks for
the gradient that a convolution's backward reads as autograd wrote it: channels first. So it is
written so, and ATen copies it back, each way across memory. Here gradients that come from our
operators are made `contiguous` with their channels last, which `packing.py` and `copies.py` then
spare: the kernels, or the `cat`, write them there. Static sizes only.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format

from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.slices import descendants, is_static, value
from bla_inductor.undo import warned_on_failure

__all__ = ["lay_channels_last"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def lay_channels_last(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite `graph`, whose nodes have their fake value as meta["val"]; how many gradients."""
    operators = graph.find_nodes(op="call_function", target=linear_attention_backward)
    operators = [n for n in operators if value(n.args[0]).device.type == device_type]
    if not operators:
        return 0
    with warned_on_failure(graph, log, "gradients of images stay as autograd lays them out"):
        after = descendants(operators)
        target = aten.convolution_backward.default
        readers = graph.find_nodes(op="call_function", target=target)
        gradients = {n.args[0]: None for n in readers if n.args[0] in after and _is_last(n)}
        for gradient in gradients:
            assert isinstance(gradient, fx.Node)
            _lay(graph, gradient)
        if gradients:
            graph.lint()
        return len(gradients)
    return 0


def _is_last(reader: fx.Node) -> bool:
    """Whether a convolution's backward reads images channels last, and a gradient that is not."""
    gradient, image = reader.args[0], reader.args[1]
    assert isinstance(gradient, fx.Node)
    assert isinstance(image, fx.Node)
    if value(image).dim() != 4 or not is_static(gradient, image):
        return False
    last = torch.channels_last
    return suggest_memory_format(value(image)) == last != suggest_memory_format(value(gradient))


def _lay(graph: fx.Graph, gradient: fx.Node) -> None:
    readers = [n for n in gradient.users if n.op != "output"]  # whose strides users see
    with graph.inserting_after(gradient):
        moved = graph.call_function(aten.permute.default, (gradient, _LAST))
    with graph.inserting_after(moved):
        form: dict[str, Any] = {"memory_format": torch.contiguous_format}
        laid = graph.call_function(aten.clone.default, (moved,), form)
    with graph.inserting_after(laid):
        back = graph.call_function(aten.permute.default, (laid, _FIRST))
    image = value(gradient).permute(_LAST)
    moved.meta = {**gradient.meta, "val": image}
    laid.meta = {**gradient.meta, "val": image.new_empty(image.shape)}
    back.meta = {**gradient.meta, "val": value(laid).permute(_FIRST)}
    for reader in readers:
        reader.replace_input_with(gradient, back)
