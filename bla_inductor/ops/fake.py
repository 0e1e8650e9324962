"""Shapes, dtypes and exact strides of the results, for fake and meta tensors; installs no
guards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bla_inductor.ops.aten import accumulation_dtype
from bla_inductor.ops.checks import check_arguments
from bla_inductor.ops.layout import empty_dense, key_batch, query_batch
from bla_inductor.ops.schema import lib


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    normalizer: str = "none",
    scale: float = 1.0,
    norm_scale: float = 1.0,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out_order: Sequence[int] | None = None,
    upcast: bool = False,
) -> Tensor:
    check_arguments(q, k, v, q_norm, k_norm, normalizer, out_dtype, out_order)
    sizes = [*query_batch((q, k, v, q_norm, k_norm)), q.shape[-2], v.shape[-1]]
    return empty_dense(q, sizes, out_dtype or q.dtype, out_order)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    normalizer: str = "none",
    scale: float = 1.0,
    norm_scale: float = 1.0,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out_order: Sequence[int] | None = None,
    upcast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _attention(
        q, k, v, q_norm, k_norm, normalizer=normalizer, out_dtype=out_dtype, out_order=out_order
    )
    batch = key_batch(k, v, k_norm)
    acc = accumulation_dtype(q.dtype)
    state = empty_dense(q, [*batch, k.shape[-1], v.shape[-1]], acc, None)
    features = (k if k_norm is None else k_norm).shape[-1]
    key_sum = empty_dense(q, [0] if normalizer == "none" else [*batch, features], acc, None)
    return out, state, key_sum


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    *,
    normalizer: str,
    scale: float,
    norm_scale: float,
    eps: float,
    needs: Sequence[bool],
    orders: Sequence[int] | None = None,
    upcast: bool = False,
) -> tuple[Tensor, ...]:
    rank = q.dim()
    return tuple(
        empty_dense(t, t.shape, t.dtype, orders and orders[i * rank : (i + 1) * rank])
        if t is not None and needs[i]
        else q.new_empty(0)
        for i, t in enumerate((q, k, v, q_norm, k_norm))
    )


torch.library.register_fake("bla::linear_attention", _attention, lib=lib)
torch.library.register_fake("bla::linear_attention_forward", _forward, lib=lib)
torch.library.register_fake("bla::linear_attention_backward", _backward, lib=lib)
