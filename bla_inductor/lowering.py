"""What Inductor makes of the operators.

On CUDA they stay calls of the Triton kernels. Elsewhere they are decomposed into the contraction in
its best order, so that feature maps, scales and casts fuse into Inductor's own loops around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bla_inductor.compat import register_decompositions
from bla_inductor.ops import aten

__all__ = ["register"]

bla = torch.ops.bla


@functools.cache
def register() -> None:
    """Tell Inductor, once.

    With a decomposition in the table, Inductor does not make a fallback of an operator by itself:
    the lowering for where it is not decomposed is registered as well.
    """
    from torch._inductor.lowering import fallback_handler, register_lowering

    register_decompositions(_OURS)
    for operator in _OURS:
        fallback = fallback_handler(operator, add_to_fallback_set=False)
        register_lowering(operator, type_promotion_kind=None)(fallback)


def _stays_a_call(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _laid_out(x: Tensor, dtype: torch.dtype, order: Sequence[int] | None) -> Tensor:
    """x in `dtype`, dense in `order`, without writing into anything."""
    x = x.to(dtype)
    if order is None:
        return x.contiguous()
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(list(order)).contiguous().permute(inverse)


def _numbers(kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    return (
        kwargs.get("normalizer", "none"),
        kwargs.get("scale", 1.0),
        kwargs.get("norm_scale", 1.0),
        kwargs.get("eps", 0.0),
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    if _stays_a_call(q):
        return NotImplemented
    out, _, _ = aten.forward(q, k, v, q_norm, k_norm, *_numbers(kwargs), keep_state=False)
    return _laid_out(out, kwargs.get("out_dtype") or q.dtype, kwargs.get("out_order"))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if _stays_a_call(q):
        return NotImplemented
    out, state, key_sum = aten.forward(q, k, v, q_norm, k_norm, *_numbers(kwargs), keep_state=True)
    assert state is not None
    assert key_sum is not None
    result = _laid_out(out, kwargs.get("out_dtype") or q.dtype, kwargs.get("out_order"))
    return result, state, key_sum


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    if _stays_a_call(q):
        return NotImplemented
    numbers = _numbers(kwargs)
    grads = aten.backward(do, q, k, v, q_norm, k_norm, state, key_sum, *numbers, kwargs["needs"])
    rank, orders = q.dim(), kwargs.get("orders")
    return tuple(
        q.new_empty(0)
        if grad is None
        else _laid_out(grad, q.dtype, orders and orders[i * rank : (i + 1) * rank])
        for i, grad in enumerate(grads)
    )


_OURS: dict[Any, Callable[..., Any]] = {
    bla.linear_attention.default: _attention,
    bla.linear_attention_forward.default: _forward,
    bla.linear_attention_backward.default: _backward,
}
