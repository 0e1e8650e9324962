"""What Inductor makes of the operators.

On CUDA they become templates of the Triton kernels: see lowering_cuda.py. Elsewhere they are
decomposed into the contraction in its best order, so that feature maps, scales and casts fuse into
Inductor's own loops around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bla_inductor.compat import register_decompositions
from bla_inductor.lowering_cuda import OPERATORS, lowering
from bla_inductor.ops import aten
from bla_inductor.ops.schema import Inputs, gradients

__all__ = ["register"]

bla = torch.ops.bla


@functools.cache
def register() -> None:
    """Tell Inductor, once.

    With a decomposition in the table, Inductor does not make a fallback of an operator by itself:
    the lowering for where it is not decomposed is registered as well.
    """
    from torch._inductor.lowering import register_lowering

    for operator in OPERATORS:
        register_lowering(operator, type_promotion_kind=None)(lowering(operator))
    register_decompositions(_OURS)


def _stays_a_call(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _laid_out(x: Tensor, dtype: torch.dtype, order: Sequence[int] | None) -> Tensor:
    """x in `dtype`, dense in `order`, without writing into anything."""
    x = x.to(dtype)
    if order is None:
        return x.contiguous()
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(list(order)).contiguous().permute(inverse)


def _result(x: Inputs, out: Tensor) -> Tensor:
    return _laid_out(out, x.out_dtype or x.q.dtype, x.out_order)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    x = Inputs(*args, **kwargs)
    if _stays_a_call(x.q):
        return NotImplemented
    return _result(x, aten.forward(x, keep_state=False)[0])


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Inputs(*args, **kwargs)
    if _stays_a_call(x.q):
        return NotImplemented
    out, state, key_sum = aten.forward(x, keep_state=True)
    assert state is not None
    assert key_sum is not None
    return _result(x, out), state, key_sum


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = gradients(*args, **kwargs)
    if _stays_a_call(call.do):
        return NotImplemented
    return tuple(
        call.inputs.q.new_empty(0)
        if grad is None or t is None
        else _laid_out(grad, t.dtype, call.order(i))
        for i, (t, grad) in enumerate(zip(call.inputs.tensors, aten.backward(call), strict=True))
    )


_OURS: dict[Any, Callable[..., Any]] = {
    bla.linear_attention.default: _attention,
    bla.linear_attention_forward.default: _forward,
    bla.linear_attention_backward.default: _backward,
}
