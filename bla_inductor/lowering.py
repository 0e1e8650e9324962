"""What Inductor makes of the operators.

On CUDA they become templates of the Triton kernels: see lowering_cuda.py. Elsewhere they are
decomposed into the contraction in its best order, so that feature maps, scales and casts fuse into
Inductor's own loops around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bla_inductor.compat import gives_kernels_memory, register_decompositions
from bla_inductor.lowering_cuda import OPERATORS, lowering
from bla_inductor.ops import aten
from bla_inductor.ops.layout import known
from bla_inductor.ops.schema import TENSORS, Gradients, Inputs, gradients

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
    gives_kernels_memory()  # also to kernels that come from a cache


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


def _folded(x: Inputs, *others: Tensor) -> tuple[Inputs, list[int]]:
    """x with its batch dims in one, and what they were; x itself and nothing where they broadcast.

    The matrix products want one batch dim, and copy what does not merge into one (heads outside of
    tokens). Everything else reads that copy as well then, and it is what is kept for the backward:
    of the tensor before it, Inductor may choose a layout that no product can read.
    """
    batch = list(x.q.shape[:-2])
    matrices = [t for t in x.tensors[:5] if t is not None]
    shapes = [list(t.shape[:-2]) for t in (*matrices, *others)]
    shapes += [] if x.key_weight is None else [list(x.key_weight.shape[:-1])]
    same = all(
        len(s) == len(batch) and all(known(a == b) for a, b in zip(s, batch, strict=True))
        for s in shapes
    )
    if len(batch) < 2 or not same:
        return x, []
    flat: dict[str, Any] = {
        name: t.flatten(0, len(batch) - 1)
        for name, t in zip(TENSORS, x.tensors, strict=True)
        if t is not None
    }
    return replace(x, **flat), batch


def _unfolded(x: Tensor | None, batch: list[int]) -> Tensor | None:
    """x with its batch dims; None and the empty tensor for what is absent as they are."""
    return x if x is None or not batch or x.dim() < 2 else x.unflatten(0, batch)


def _forward_folded(x: Inputs, *, keep_state: bool) -> tuple[Any, ...]:
    folded, batch = _folded(x)
    results = aten.forward(folded, keep_state=keep_state)
    return tuple(_unfolded(t, batch) for t in results)


def _backward_folded(call: Gradients) -> list[Tensor | None]:
    folded, batch = _folded(call.inputs, call.do)
    if not batch:
        return aten.backward(call)
    last = len(batch) - 1
    sums = call.key_sum.flatten(0, last) if call.inputs.normalized else call.key_sum
    flat = replace(
        call,
        do=call.do.flatten(0, last),
        inputs=folded,
        state=call.state.flatten(0, last),
        key_sum=sums,
    )
    return [_unfolded(grad, batch) for grad in aten.backward(flat)]


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    x = Inputs(*args, **kwargs)
    if _stays_a_call(x.q):
        return NotImplemented
    return _result(x, _forward_folded(x, keep_state=False)[0])


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Inputs(*args, **kwargs)
    if _stays_a_call(x.q):
        return NotImplemented
    out, state, key_sum = _forward_folded(x, keep_state=True)
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
        for i, (t, grad) in enumerate(zip(call.inputs.tensors, _backward_folded(call), strict=True))
    )


_OURS: dict[Any, Callable[..., Any]] = {
    bla.linear_attention.default: _attention,
    bla.linear_attention_forward.default: _forward,
    bla.linear_attention_backward.default: _backward,
}
