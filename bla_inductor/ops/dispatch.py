"""Which implementation runs: Triton for CUDA tensors it covers, ATen for everything else.

ATen takes over on CUDA where Triton is missing, for float64, and for tensors without elements. Head
dims above the kernels' limit are an error there, not a silent change of algorithm.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from bla_inductor.ops import aten
from bla_inductor.ops.checks import check_arguments
from bla_inductor.ops.layout import dense_order, empty_dense, key_batch, query_batch
from bla_inductor.ops.schema import lib

MAX_HEAD_DIM = 256
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _forward_aten(
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
    check_arguments(q, k, v, q_norm, k_norm, normalizer, out_dtype, out_order)
    with aten.without_autocast(q.device.type):
        out, state, key_sum = aten.forward(
            q, k, v, q_norm, k_norm, normalizer, scale, norm_scale, eps, keep_state=True
        )
    assert state is not None
    assert key_sum is not None
    return aten.dense(out, out_dtype or q.dtype, out_order), state, key_sum


def _attention_aten(
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
    with aten.without_autocast(q.device.type):
        out, _, _ = aten.forward(
            q, k, v, q_norm, k_norm, normalizer, scale, norm_scale, eps, keep_state=False
        )
    return aten.dense(out, out_dtype or q.dtype, out_order)


def _backward_aten(
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
    with aten.without_autocast(q.device.type):
        grads = aten.backward(
            do, q, k, v, q_norm, k_norm, state, key_sum, normalizer, scale, norm_scale, eps, needs
        )
    rank = q.dim()
    return tuple(
        q.new_empty(0)
        if grad is None
        else aten.dense(grad, q.dtype, orders and orders[i * rank : (i + 1) * rank])
        for i, grad in enumerate(grads)
    )


def _kernels(tensors: Sequence[Tensor | None], out_dtype: torch.dtype) -> ModuleType | None:
    """The Triton implementation if it covers these tensors, else None."""
    given = [t for t in tensors if t is not None]
    if given[0].dtype not in _KERNEL_DTYPES or out_dtype not in _KERNEL_DTYPES:
        return None
    if any(t.numel() == 0 for t in given):
        return None
    for name, t in zip(("q", "k", "v", "q_norm", "k_norm"), tensors, strict=True):
        if t is not None and t.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"bla::linear_attention: argument '{name}' has a head dim of {t.shape[-1]}, "
                "expected at most "
                f"{MAX_HEAD_DIM}, the limit of the CUDA kernels. Use more heads, or keep the "
                "plain formula."
            )
    try:
        from bla_inductor import kernels
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return kernels


def _forward_cuda(
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
    check_arguments(q, k, v, q_norm, k_norm, normalizer, out_dtype, out_order)
    dtype = out_dtype or q.dtype
    tensors = (q, k, v, q_norm, k_norm)
    kernels = _kernels(tensors, dtype)
    if kernels is None:
        return _forward_aten(
            *tensors,
            normalizer=normalizer,
            scale=scale,
            norm_scale=norm_scale,
            eps=eps,
            out_dtype=out_dtype,
            out_order=out_order,
        )
    out = empty_dense(q, [*query_batch(tensors), q.shape[-2], v.shape[-1]], dtype, out_order)
    state, key_sum = kernels.forward(
        out, *tensors, key_batch(k, v, k_norm), normalizer, scale, norm_scale, eps, upcast
    )
    return out, state, key_sum


def _attention_cuda(*args: Tensor | None, **kwargs: object) -> Tensor:
    return _forward_cuda(*args, **kwargs)[0]  # type: ignore[arg-type]


def _backward_cuda(
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
    tensors = (q, k, v, q_norm, k_norm)
    kernels = _kernels(tensors, do.dtype)
    if kernels is None:
        return _backward_aten(
            do,
            *tensors,
            state,
            key_sum,
            normalizer=normalizer,
            scale=scale,
            norm_scale=norm_scale,
            eps=eps,
            needs=needs,
            orders=orders,
        )
    rank = q.dim()
    grads = [
        empty_dense(t, t.shape, t.dtype, orders and orders[i * rank : (i + 1) * rank])
        if t is not None and needs[i]
        else None
        for i, t in enumerate(tensors)
    ]
    numbers = (scale, norm_scale, eps)
    kernels.backward(grads, do, *tensors, state, key_sum, normalizer, *numbers, upcast)
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def gradient_orders(tensors: Sequence[Tensor | None]) -> list[int]:
    """The `orders` argument: each gradient is laid out like its input, where that is dense."""
    rank = next(t.dim() for t in tensors if t is not None)
    identity = list(range(rank))
    return [d for t in tensors for d in (identity if t is None else dense_order(t))]


lib.impl("linear_attention", _attention_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention_forward", _forward_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention_backward", _backward_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention", _attention_cuda, "CUDA")
lib.impl("linear_attention_forward", _forward_cuda, "CUDA")
lib.impl("linear_attention_backward", _backward_cuda, "CUDA")
