"""Operands whose channels are apart in memory, as an image's with its channels first: the kernels
read copies of these. What a loop of Inductor's computes it can write as the kernels read it. Inputs
and what cuDNN or cuBLAS writes take a loop more; but around convolutions of images Inductor mostly
lays everything out with its channels last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from bla_inductor.algebra import Observation
from bla_inductor.operands import Operand
from bla_inductor.ops.layout import known

__all__ = ["beside", "laid_channels_last", "written_apart"]

_IMAGES = ("conv2d", "conv_transpose2d")
_OTHERS = ("conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d")
_PRODUCTS = ("linear", "einsum", "matmul", "bmm", "mm", "baddbmm", "addmm", "addbmm", "tensordot")
_SMALL = 64  # channels


def beside(operand: Operand, seen: Observation) -> bool:
    """Whether the channels of an operand are beside each other in memory."""
    if operand.source is None:
        return True
    strides = seen.tensors[operand.source.node].stride()
    axes = zip(operand.source.axes, strides, strict=True)
    return any(operand.columns[-1:] == axis[-1:] and known(s == 1) for axis, s in axes)


def written_apart(operand: Operand, seen: Observation, last: bool) -> bool:
    """Whether no loop of Inductor's computes an operand: it is a view of an input or of what a
    library writes. last: images are laid out with their channels last.
    """
    if operand.source is None:
        return False
    node = operand.source.node
    memory = seen.storage_of(seen.tensors[node])
    made = (n for n in node.graph.nodes if n in seen.tensors)
    first = next((n for n in made if seen.storage_of(seen.tensors[n]) == memory), node)
    if first.op in ("placeholder", "get_attr"):
        return True
    return _name(first) in (*_PRODUCTS, *_OTHERS, *(() if last else _IMAGES))


def laid_channels_last(graph: fx.Graph, seen: Observation) -> bool:
    """Whether Inductor will lay images out with their channels last where `graph` is trained, as
    its `GraphLowering.decide_layout_opt` decides later, when operators are ATen's.
    """
    from torch._inductor import config

    shapes = list(_convolutions(graph, seen))
    if not config.layout_optimization or not shapes:
        return False
    if config.force_layout_optimization:
        return True
    if not all(isinstance(s, int) for image, weight in shapes for s in (*image, *weight)):
        return False
    grouped = any(1 < weight[1] < image[1] for image, weight in shapes)
    narrowing = any(2 * weight[0] <= weight[1] and weight[2] > 1 for _, weight in shapes)
    small = all(max(weight[:2]) <= _SMALL for _, weight in shapes)
    return not (grouped or narrowing or small)


def _convolutions(graph: fx.Graph, seen: Observation) -> Iterable[tuple[Any, Any]]:
    """The shapes of image and weight of every convolution."""
    for node in graph.nodes:
        if _name(node) in (*_IMAGES, *_OTHERS):
            image, weight = _tensor(node, 0, "input", seen), _tensor(node, 1, "weight", seen)
            if image is not None and weight is not None:
                yield image.shape, weight.shape


def _tensor(node: fx.Node, position: int, name: str, seen: Observation) -> Tensor | None:
    given = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return seen.tensors.get(given) if isinstance(given, fx.Node) else None


def _name(node: fx.Node) -> str:
    """That of the function or method which a node calls, without its overload."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = getattr(node.target, "__name__", node.target)
    return str(name).split(".")[0].strip("_")
