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
from bla_inductor.ops.layout import ROW, known

__all__ = ["beside", "laid_channels_last", "will_be_beside", "written_apart"]

_IMAGES = ("conv2d", "conv_transpose2d")
_OTHERS = ("conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d")
_PRODUCTS = ("linear", "einsum", "matmul", "bmm", "mm", "baddbmm", "addmm", "addbmm", "tensordot")
_KEPT = ("softmax", "special_softmax")
_SMALL = 64  # channels
_NODES = 100  # a convolution, at most: Inductor counts 300 of ATen's, Dynamo's here are fewer


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
    first = _origin(operand.source.node, seen)
    if first.op in ("placeholder", "get_attr"):
        return True
    return _name(first) in (*_PRODUCTS, *_OTHERS, *(() if last else _IMAGES))


def will_be_beside(operand: Operand, seen: Observation) -> bool:
    """Whether the channels of an operand whose graph is trained will be beside each other, though
    they are not in eager mode. It is a view of

    - what a convolution of images writes with its channels last, in rows that the kernels can read
      (of whole 16 bytes); but if that adds a bias, Inductor has a loop for it, which writes as well
      what the kernels read;
    - a softmax, which its own backward reads again, so that Inductor has it in memory and writes it
      once for both.
    """
    if operand.source is None:
        return False
    node = operand.source.node
    first = _origin(node, seen)
    if _name(first) in _KEPT:
        return True
    bias = first.args[2] if len(first.args) > 2 else first.kwargs.get("bias")
    if _name(first) not in _IMAGES or bias is not None:
        return False
    image = seen.tensors[first]
    whole = known(image.shape[1] * image.element_size() % ROW == 0)
    return whole and laid_channels_last(node.graph, seen)


def _origin(node: fx.Node, seen: Observation) -> fx.Node:
    """The first node whose memory `node` is a view of."""
    memory = seen.storage_of(seen.tensors[node])
    made = (n for n in node.graph.nodes if n in seen.tensors)
    return next((n for n in made if seen.storage_of(seen.tensors[n]) == memory), node)


def laid_channels_last(graph: fx.Graph, seen: Observation) -> bool:
    """Whether Inductor will lay images out with their channels last where `graph` is trained, as
    its `GraphLowering.decide_layout_opt` decides later, when operators are ATen's.
    """
    from torch._inductor import config

    shapes = list(_convolutions(graph, seen))
    if not config.layout_optimization or len(graph.nodes) > _NODES * len(shapes):
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
