"""Powers around the operator that cost more than the attention: xᵖ = exp(p · log x).

A feature map like ReLU(x)ᵖ with learned exponents (PolaFormer) takes three kernels of Inductor's
that are bound by the arithmetic of `pow`: about a hundred instructions an entry, and in the
backward two such powers. Where x has been rounded to 16 bits on its way, the logarithm and the
exponential of the hardware are enough: in fp32 they are off by |p · log x| · 2⁻²², while the
rounding of x has made xᵖ uncertain by p · 2⁻⁹ (bf16) or p · 2⁻¹² (fp16).

Powers of fp32 data, and with whole or half numbers as exponents, for which Inductor multiplies or
takes roots, stay as they are. So does every graph without our operators.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bla_inductor.lowering_cuda import OPERATORS
from bla_inductor.ops.layout import known
from bla_inductor.slices import VIEWS, value
from bla_inductor.undo import warned_on_failure

__all__ = ["powers_by_logarithm"]

log = logging.getLogger(__name__)
aten, prims = torch.ops.aten, torch.ops.prims

_HALF = (torch.bfloat16, torch.float16)
_POWERS = (aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar)
_MOVES = (
    *VIEWS,
    aten.permute.default,
    aten.slice.Tensor,
    aten.expand.default,
    aten.clone.default,
    prims.convert_element_type.default,
)
_NEVER_NEGATIVE = (aten.relu.default, aten.abs.default, aten.exp.default, aten.sigmoid.default)
_STEPS = 32  # nodes before a power that are looked at


def powers_by_logarithm(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite `graph`, whose nodes have their fake value as meta["val"]; how many powers."""
    if not any(graph.find_nodes(op="call_function", target=operator) for operator in OPERATORS):
        return 0
    powers = [n for o in _POWERS for n in graph.find_nodes(op="call_function", target=o)]
    with warned_on_failure(graph, log, "powers are computed as they were written"):
        chosen = [node for node in powers if _is_worth_it(node, device_type)]
        for node in chosen:
            node.replace_all_uses_with(_by_logarithm(node))
            graph.erase_node(node)
        if chosen:
            graph.lint()
            log.debug("%d powers are computed as exp(p · log x)", len(chosen))
        return len(chosen)
    return 0


def _is_worth_it(power: fx.Node, device_type: str) -> bool:
    base, exponent = power.args
    if not isinstance(base, fx.Node) or not _is_real(power) or not _is_real(base):
        return False
    if value(power).device.type != device_type:
        return False
    if isinstance(exponent, fx.Node):
        if not _is_real(exponent):
            return False
    elif not isinstance(exponent, float) or (2 * exponent).is_integer():
        return False
    return _was_rounded(base)


def _is_real(node: fx.Node) -> bool:
    return value(node).dtype in (*_HALF, torch.float32)


def _is_nonnegative(node: fx.Node) -> bool:
    while node.target in _MOVES:
        node = node.args[0]  # type: ignore[assignment]
    return node.target in _NEVER_NEGATIVE


def _was_rounded(base: fx.Node) -> bool:
    """Whether a 16-bit tensor of the base's size goes into it, entry by entry."""
    size = value(base).numel()
    waiting, seen = [base], 0
    while waiting and seen < _STEPS:
        node, seen = waiting.pop(), seen + 1
        x = node.meta.get("val")
        if not isinstance(x, torch.Tensor) or not known(x.numel() >= size):
            continue
        if x.dtype in _HALF:
            return True
        tags = getattr(node.target, "tags", ())
        if node.target in _MOVES or torch.Tag.pointwise in tags:
            waiting.extend(node.all_input_nodes)
    return False


def _by_logarithm(power: fx.Node) -> fx.Node:
    graph = power.graph

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        known = [value(a) if isinstance(a, fx.Node) else a for a in args]
        with value(power).fake_mode:  # type: ignore[attr-defined]
            made.meta = {**power.meta, "val": target(*known)}
        return made

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, fx.Node) or value(x).dtype == dtype:
            return x
        return call(prims.convert_element_type.default, x, dtype)

    with graph.inserting_before(power):
        x, p = (cast(argument, torch.float32) for argument in power.args)
        plain = _is_nonnegative(power.args[0])  # type: ignore[arg-type]
        size = x if plain else call(aten.abs.default, x)
        result = call(aten.exp.default, call(aten.mul.Tensor, call(aten.log.default, size), p))
        if isinstance(p, fx.Node):  # 0 · log 0 and ∞ · log 1 are no numbers; 0⁰ and 1^∞ are 1
            of_zero, of_one = call(aten.eq.Scalar, p, 0), call(aten.eq.Scalar, size, 1)
            is_one = call(aten.logical_or.default, of_zero, of_one)
            result = call(aten.where.ScalarSelf, is_one, 1.0, result)
        if not plain:
            of_negative = _of_negative(call, result, p)
            result = call(aten.where.self, call(aten.lt.Scalar, x, 0), of_negative, result)
        return cast(result, value(power).dtype)


def _of_negative(call: Callable[..., fx.Node], power: fx.Node, p: Any) -> fx.Node:
    """(-x)ᵖ from xᵖ: no number unless p is whole."""
    if not isinstance(p, fx.Node):
        return call(aten.full_like.default, power, math.nan)
    half = call(aten.mul.Tensor, p, 0.5)
    is_even = call(aten.eq.Tensor, half, call(aten.trunc.default, half))
    is_whole = call(aten.eq.Tensor, p, call(aten.trunc.default, p))
    signed = call(aten.where.self, is_even, power, call(aten.neg.default, power))
    return call(aten.where.ScalarOther, is_whole, signed, math.nan)
