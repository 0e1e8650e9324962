"""What Inductor makes of the operators.

On CUDA they stay calls of the Triton kernels. Elsewhere they are decomposed into the contraction in
its best order, so that feature maps, scales and casts fuse into Inductor's own loops around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import register_decomposition

from bla_inductor.ops import aten

__all__: list[str] = []

bla = torch.ops.bla


def _laid_out(x: Tensor, dtype: torch.dtype, order: Sequence[int] | None) -> Tensor:
    """x in `dtype`, dense in `order`, without writing into anything."""
    x = x.to(dtype)
    if order is None:
        return x.contiguous()
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(list(order)).contiguous().permute(inverse)


def _off_cuda(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decompose on every device but CUDA."""

    def register(decomposition: Callable[..., Any]) -> Callable[..., Any]:
        def decompose(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first.device.type == "cuda":
                return NotImplemented
            return decomposition(first, *args, **kwargs)

        register_decomposition(list(operators))(decompose)
        return decompose

    return register


def _numbers(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    defaults = {"normalizer": "none", "scale": 1.0, "norm_scale": 1.0, "eps": 0.0}
    return tuple(kwargs.get(name, default) for name, default in defaults.items())


def _five(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return (*tensors, *(None,) * (5 - len(tensors)))


@_off_cuda(bla.linear_attention.default)
def _attention(*args: Tensor | None, **kwargs: Any) -> Tensor:
    q, *others = _five(args)
    out, _, _ = aten.forward(q, *others, *_numbers(kwargs), keep_state=False)
    return _laid_out(out, kwargs.get("out_dtype") or q.dtype, kwargs.get("out_order"))


@_off_cuda(bla.linear_attention_forward.default)
def _forward(*args: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, *others = _five(args)
    out, state, key_sum = aten.forward(q, *others, *_numbers(kwargs), keep_state=True)
    assert state is not None
    assert key_sum is not None
    result = _laid_out(out, kwargs.get("out_dtype") or q.dtype, kwargs.get("out_order"))
    return result, state, key_sum


@_off_cuda(bla.linear_attention_backward.default)
def _backward(do: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    k, v, q_norm, k_norm, state, key_sum = args
    numbers = _numbers(kwargs)
    grads = aten.backward(
        do, q, k, v, q_norm, k_norm, state, key_sum, *numbers, needs=kwargs["needs"]
    )
    rank, orders = q.dim(), kwargs.get("orders")
    return tuple(
        q.new_empty(0)
        if grad is None
        else _laid_out(grad, q.dtype, orders and orders[i * rank : (i + 1) * rank])
        for i, grad in enumerate(grads)
    )
