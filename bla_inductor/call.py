"""The operator's call in the graph, and what surrounds it: casts, layouts, scalings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bla_inductor.ops  # noqa: F401  (registers torch.ops.bla)
from bla_inductor.algebra import Axes, Observation
from bla_inductor.algebra.regions import is_differentiated
from bla_inductor.apart import will_be_beside
from bla_inductor.emit import Emitter, Unemittable, memory_order
from bla_inductor.operands import Operand, Piece
from bla_inductor.ops.layout import readable
from bla_inductor.plan import Plan

__all__ = ["emit"]

aten = torch.ops.aten
_VIEWS = {aten.permute.default, aten.reshape.default, aten.view.default, aten.expand.default}


def emit(plan: Plan, emitter: Emitter, seen: Observation) -> fx.Node:
    """Write the operator and what surrounds it; the node that takes the place of `root`."""
    nodes = {name: _operand(plan, emitter, o, seen) for name, o in plan.distinct().items()}
    kwargs: dict[str, Any] = {"scale": _scale(plan, emitter, plan.scale, "q", "k", "v")}
    if (z := plan.found.normaliser) is not None:
        kwargs["normalizer"] = z.kind
        kwargs["norm_scale"] = _scale(plan, emitter, z.scale, "q_norm", "k_norm")
        kwargs["eps"] = emitter.number(z.eps)
    if plan.dtype != plan.compute_dtype:
        kwargs["out_dtype"] = plan.dtype
    if plan.upcast:
        kwargs["upcast"] = True
    if plan.out_order is not None:
        kwargs["out_order"] = list(plan.out_order)
    for name in ("q_norm", "k_norm"):
        if name in nodes:
            kwargs[name] = nodes[name]
    for name, operand in plan.distinct().items():
        if operand.map is not None:
            kwargs[f"{name}_map"] = operand.map.text
    if (weight := plan.gathered.weight) is not None:
        kwargs["key_weight"] = _weight(plan, emitter, weight)
    result = emitter.call(
        torch.ops.bla.linear_attention.default, nodes["q"], nodes["k"], nodes["v"], **kwargs
    )
    axes: Axes = (*((i,) for i in plan.batch), plan.n, plan.d)
    for piece in plan.outer:
        result = _applied(emitter, result, piece, axes)
    result = emitter.laid_out(result, axes, plan.axes, [False] * len(plan.axes))
    if plan.addend is not None:
        node, factor = plan.addend
        result = emitter.call(aten.add.Tensor, result, node, alpha=emitter.number(factor))
    result = emitter.cast(result, plan.dtype)
    if result.target in _VIEWS and _written_elsewhere(plan.root, seen):
        result = emitter.call(aten.clone.default, result)
    if not plan.exact:
        return result
    original = seen.tensors[plan.root]
    if not emitter.same_layout(result, original):
        order = memory_order(original, seen.hint)
        result = emitter.call(aten.permute.default, result, order)
        result = emitter.call(aten.clone.default, result, memory_format=torch.contiguous_format)
        inverse = [order.index(dim) for dim in range(len(order))]
        result = emitter.call(aten.permute.default, result, inverse)
    if not emitter.same_layout(result, original):
        raise Unemittable("its result has strides that no kernel writes")
    return result


def _written_elsewhere(root: fx.Node, seen: Observation) -> bool:
    """Whether what is made in a `no_grad` region may be written outside of it, which autograd
    refuses for a view.
    """
    at = seen.position[root]
    left = any(
        n.target is torch._C._set_grad_enabled and n.args[0] and seen.position[n] > at
        for n in root.graph.nodes
        if n in seen.position
    )
    return left and seen.written(root, at)


def _scale(plan: Plan, emitter: Emitter, coef: Any, *names: str) -> Any:
    for name in names:
        coef = coef / plan.operands[name].coef
    return emitter.number(coef)


def _operand(plan: Plan, emitter: Emitter, operand: Operand, seen: Observation) -> fx.Node:
    target: Axes = (*((i,) for i in plan.batch), operand.rows, operand.columns)
    fill = [False] * len(plan.batch) + [True, True]
    if operand.source is not None:
        node = operand.source.node
        if operand.map is None:  # else what is before φ may be narrower, and stays that
            node = emitter.cast(node, operand.dtype)
        node = emitter.cast(node, plan.compute_dtype)
        node = emitter.laid_out(node, operand.source.axes, target, fill)
        return _copied(emitter, node, operand, seen) if is_differentiated(plan.root) else node
    (first, *rest) = sorted(operand.pieces, key=lambda p: p.how != "times")
    result = emitter.laid_out(_read(emitter, first), first.source.axes, target, fill)
    result = emitter.cast(result, operand.dtype)
    for piece in rest:
        result = _applied(emitter, result, piece, target)
    return emitter.cast(emitter.cast(result, operand.dtype), plan.compute_dtype)


def _weight(plan: Plan, emitter: Emitter, weight: Operand) -> fx.Node:
    """Key weights as (*batch, M), batch dims that they do not have of size one."""
    target: Axes = (*((i,) for i in plan.batch), weight.rows)
    fill = [False] * len(plan.batch) + [True]
    (first, *rest) = weight.pieces
    result = emitter.laid_out(_read(emitter, first), first.source.axes, target, fill)
    for piece in rest:
        result = _applied(emitter, result, piece, target)
    dtype = emitter.fake(result).dtype
    known = dtype.is_floating_point or dtype == torch.bool
    wide = torch.float64 if plan.compute_dtype == torch.float64 else torch.float32
    return result if known else emitter.cast(result, wide)


def _copied(emitter: Emitter, node: fx.Node, operand: Operand, seen: Observation) -> fx.Node:
    """On CUDA, a copy of what the kernels could not read in wide pieces along the features.

    They would make one as well, but the backward another; this one is kept for it. None of what
    will have its features beside each other after all. Where there is no backward, Inductor
    decides when it knows how everything lies: see templates/tiles.py.
    """
    assert operand.source is not None
    fake, given = emitter.fake(node), seen.tensors[operand.source.node]
    if fake.device.type != "cuda" or readable(fake):
        return node
    is_view = seen.storage_of(fake) == seen.storage_of(given)
    if is_view and will_be_beside(operand, seen):
        return node
    return emitter.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _read(emitter: Emitter, piece: Piece) -> fx.Node:
    """The tensor of a piece, in the precision that it was read in."""
    node, dtype = piece.source.node, piece.source.dtype
    return emitter.cast(node, dtype) if dtype.is_floating_point else node


def _applied(emitter: Emitter, result: fx.Node, piece: Piece, axes: Axes) -> fx.Node:
    """One more factor of a product."""
    other = _read(emitter, piece)
    if emitter.fake(other).dim():  # else a scalar, which may be on the CPU as long as it is one
        other = emitter.laid_out(other, piece.source.axes, axes, [False] * len(axes))
    if piece.how in ("where", "unless"):
        gone = emitter.call(aten.logical_not.default, other) if piece.how == "where" else other
        return emitter.call(aten.masked_fill.Scalar, result, gone, 0)
    target = aten.mul.Tensor if piece.how == "times" else aten.div.Tensor
    return emitter.call(target, result, other)
