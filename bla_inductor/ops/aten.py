"""The operator in plain ATen: the CPU path, the path of devices without Triton, and the second
derivative.

Everything is computed in fp32 (fp64 for fp64 inputs) whatever autocast says. The contraction is
associated the cheaper way: φ(Q)(φ(K)ᵀV) costs (N + M)·D·Dv products a head, (φ(Q)φ(K)ᵀ)V costs
N·M·(D + Dv). `backward` is written in differentiable operations, so the derivative of the backward
is autograd's.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bla_inductor.ops.layout import empty_dense, key_batch, known, reduce_batch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """The body of an operator runs with autocast still on in eager mode: turn it off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def dense(x: Tensor, dtype: torch.dtype, order: Sequence[int] | None) -> Tensor:
    """x in `dtype`, dense in `order`; x itself where it is that already."""
    out = empty_dense(x, x.shape, dtype, order)
    return x if x.dtype == dtype and x.stride() == out.stride() else out.copy_(x)


def key_statistics(
    k: Tensor, v: Tensor, k_norm: Tensor | None, normalizer: str
) -> tuple[Tensor, Tensor]:
    """state = Σ_m kᵀv (*key batch, D, Dv) and key_sum = Σ_m k' (*key batch, D'), or (0,) for
    "none".
    """
    acc = accumulation_dtype(k.dtype)
    batch = key_batch(k, v, k_norm)
    state = torch.matmul(k.to(acc).mT, v.to(acc))
    state = state.expand(*batch, *state.shape[-2:]).contiguous()
    if normalizer == "none":
        return state, state.new_empty(0)
    key_sum = (k if k_norm is None else k_norm).sum(-2, dtype=acc)
    return state, key_sum.expand(*batch, key_sum.shape[-1]).contiguous()


def _guarded(z: Tensor, normalizer: str, eps: float) -> Tensor:
    return z + eps if normalizer == "add" else z.clamp(min=eps)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    normalizer: str,
    scale: float,
    norm_scale: float,
    eps: float,
    *,
    keep_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, state, key_sum) in the accumulation dtype; the latter two only with `keep_state`."""
    acc = accumulation_dtype(q.dtype)
    n, m, d, dv = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    query = q.to(acc)
    state = key_sum = None
    # With symbolic sizes, where neither is known to be cheaper, the state is formed first.
    if keep_state or not known((n + m) * d * dv > n * m * (d + dv)):
        state, key_sum = key_statistics(k, v, k_norm, normalizer)
        out = torch.matmul(query, state)
    else:
        out = torch.matmul(torch.matmul(query, k.to(acc).mT), v.to(acc))
    if normalizer != "none":
        if key_sum is None:
            key_sum = (k if k_norm is None else k_norm).sum(-2, dtype=acc)
        z = torch.matmul(query if q_norm is None else q_norm.to(acc), key_sum.unsqueeze(-1))
        out = out * (scale / _guarded(z * norm_scale, normalizer, eps))
    elif scale != 1.0:
        out = out * scale
    return out, state, key_sum


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    normalizer: str,
    scale: float,
    norm_scale: float,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of q, k, v, q_norm, k_norm in the accumulation dtype and the inputs' shapes, None
    if unneeded.

    With g = scale·do/guard(z) and t = g·stateᵀ:
        dq = t      dstate = qᵀg      dk = v·dstateᵀ      dv = k·dstate
        dz = -rowsum(t∘q)/guard(z)·norm_scale      dq' = dz·key_sumᵀ      dk' = Σ_n dz·q'
    """
    acc = accumulation_dtype(q.dtype)
    normalized = normalizer != "none"
    query, key, value, g = q.to(acc), k.to(acc), v.to(acc), do.to(acc)
    query_norm = query if q_norm is None else q_norm.to(acc)
    needs_query_norm = normalized and needs[0 if q_norm is None else 3]
    needs_key_norm = normalized and needs[1 if k_norm is None else 4]
    grads: list[Tensor | None] = [None] * 5

    if normalized:
        z = torch.matmul(query_norm, key_sum.unsqueeze(-1)) * norm_scale
        den = _guarded(z, normalizer, eps)
        g = g * (scale / den)
    elif scale != 1.0:
        g = g * scale
    if needs[0] or needs_query_norm or needs_key_norm:
        t = torch.matmul(g, state.mT)
        if needs[0]:
            grads[0] = reduce_batch(t, q.shape[:-2])
    if needs_query_norm or needs_key_norm:
        dz = (t * query).sum(-1, keepdim=True) * (-norm_scale) / den
        if normalizer == "clamp":
            dz = torch.where(z >= eps, dz, 0.0)
    if needs_query_norm:
        target = q if q_norm is None else q_norm
        dq_norm = reduce_batch(dz * key_sum.unsqueeze(-2), target.shape[:-2])
        if q_norm is None:
            assert grads[0] is not None
            grads[0] = grads[0] + dq_norm
        else:
            grads[3] = dq_norm
    if needs[1] or needs[2]:
        dstate = reduce_batch(torch.matmul(query.mT, g), key_batch(k, v, None))
        if needs[1]:
            grads[1] = reduce_batch(torch.matmul(value, dstate.mT), k.shape[:-2])
        if needs[2]:
            grads[2] = reduce_batch(torch.matmul(key, dstate), v.shape[:-2])
    if needs_key_norm:
        target = k if k_norm is None else k_norm
        dk_norm = reduce_batch((dz * query_norm).sum(-2, keepdim=True), target.shape[:-2])
        if k_norm is None:
            assert grads[1] is not None
            grads[1] = grads[1] + dk_norm
        else:
            grads[4] = dk_norm.expand(target.shape)
    return grads
