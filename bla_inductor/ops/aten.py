"""The operator in plain ATen: the CPU path, the path of devices without Triton, and the second
derivative.

Everything is computed in fp32 (fp64 for fp64 inputs) whatever autocast says. The contraction is
associated the cheaper way: φ(Q)(φ(K)ᵀV) costs (N + M)·D·Dv products a head, (φ(Q)φ(K)ᵀ)V costs
N·M·(D + Dv). `backward` is written in differentiable operations, so the derivative of the backward
is autograd's.

Names: query, key, query_norm, key_norm are φ of q, k, q', k'; weight is w, (*batch, M, 1).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bla_inductor.compat import clamp_is_flat_at_its_bounds
from bla_inductor.ops.feature_torch import apply, gradient
from bla_inductor.ops.layout import empty_dense, key_batch, known, reduce_batch
from bla_inductor.ops.schema import Gradients, Inputs


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


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """As torch.matmul, which is traced with an `expand` that does nothing before each `bmm`: enough
    for AOTAutograd not to see that an operand is in memory anyway, and to keep another one.
    """
    if a.dim() == b.dim() == 3 and known(a.shape[0] == b.shape[0]):
        return torch.bmm(a, b)
    return torch.matmul(a, b)


def _query(x: Inputs) -> Tensor:
    return apply(x.q_map, x.q.to(accumulation_dtype(x.q.dtype)))


def _query_norm(x: Inputs, query: Tensor) -> Tensor:
    return query if x.q_norm is None else apply(x.q_norm_map, x.q_norm.to(query.dtype))


def _key(x: Inputs) -> Tensor:
    return apply(x.k_map, x.k.to(accumulation_dtype(x.k.dtype)))


def _key_norm(x: Inputs, key: Tensor) -> Tensor:
    return key if x.k_norm is None else apply(x.k_norm_map, x.k_norm.to(key.dtype))


def _weight(x: Inputs, dtype: torch.dtype) -> Tensor | None:
    return None if x.key_weight is None else x.key_weight.to(dtype).unsqueeze(-1)


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _guarded(z: Tensor, normalizer: str, eps: float) -> Tensor:
    return z + eps if normalizer == "add" else z.clamp(min=eps)


def _divisor(den: Tensor, scale: float) -> Tensor:
    """den / scale. What is divided by it is not multiplied by 1/den, which is infinite where den is
    too small for a number of full precision.
    """
    return den if scale == 1.0 else den / scale


def key_statistics(x: Inputs) -> tuple[Tensor, Tensor]:
    """state = Σ_m w·kᵀv (*key batch, D, Dv) and key_sum = Σ_m w·k' (*key batch, D'), or (0,) for
    "none".
    """
    return _statistics(x, _key(x))


def _statistics(x: Inputs, key: Tensor) -> tuple[Tensor, Tensor]:
    weighted = _times(key, _weight(x, key.dtype))
    batch = key_batch(x.k, x.v, x.k_norm, x.key_weight)
    state = _matmul(weighted.mT, x.v.to(key.dtype))
    state = state.expand(*batch, *state.shape[-2:]).contiguous()
    if not x.normalized:
        return state, state.new_empty(0)
    key_sum = _key_sum(x, key, weighted)
    return state, key_sum.expand(*batch, key_sum.shape[-1]).contiguous()


def _key_sum(x: Inputs, key: Tensor, weighted: Tensor) -> Tensor:
    if x.k_norm is None:
        return weighted.sum(-2)
    return _times(_key_norm(x, key), _weight(x, key.dtype)).sum(-2)


def forward(x: Inputs, *, keep_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, state, key_sum) in the accumulation dtype; the latter two only with `keep_state`."""
    n, m, d, dv = x.q.shape[-2], x.k.shape[-2], x.q.shape[-1], x.v.shape[-1]
    query, key = _query(x), _key(x)
    state = key_sum = None
    # With symbolic sizes, where neither is known to be cheaper, the state is formed first.
    if keep_state or not known((n + m) * d * dv > n * m * (d + dv)):
        state, key_sum = _statistics(x, key)
        out = _matmul(query, state)
    else:
        weighted = _times(key, _weight(x, key.dtype))
        out = _matmul(_matmul(query, weighted.mT), x.v.to(key.dtype))
        if x.normalized:
            key_sum = _key_sum(x, key, weighted)
    if x.normalized:
        assert key_sum is not None
        z = _matmul(_query_norm(x, query), key_sum.unsqueeze(-1))
        out = out / _divisor(_guarded(z * x.norm_scale, x.normalizer, x.eps), x.scale)
    elif x.scale != 1.0:
        out = out * x.scale
    return out, state, key_sum


def backward(call: Gradients) -> list[Tensor | None]:
    """Gradients of q, k, v, q_norm, k_norm, key_weight in the accumulation dtype and the inputs'
    shapes, None if unneeded.

    With g = scale·do/guard(z), t = g·stateᵀ and u = v·dstateᵀ:
        dquery = t      dstate = queryᵀg      dkey = w·u      dv = w·key·dstate
        dz = -rowsum(t∘query)/guard(z)·norm_scale      dquery' = dz·key_sumᵀ
        dkey_sum = Σ_n dz·query'      dkey' = w·dkey_sum
        dw = rowsum(key∘u) + key'·dkey_sum
    and then through φ: dq = φ'(q)∘dquery for a pointwise φ.
    """
    x, needs = call.inputs, call.needs
    query, key = _query(x), _key(x)
    acc, weight = query.dtype, _weight(x, query.dtype)
    query_norm = _query_norm(x, query)
    g = call.do.to(acc)
    needs_query_norm = x.normalized and needs[0 if x.q_norm is None else 3]
    needs_key_norm = x.normalized and needs[1 if x.k_norm is None else 4]
    needs_weight = needs[5] and x.key_weight is not None
    needs_key_sum = x.normalized and (needs_key_norm or needs_weight)
    dquery = dquery_norm = dkey = dkey_norm = dvalue = dweight = None

    if x.normalized:
        z = _matmul(query_norm, call.key_sum.unsqueeze(-1)) * x.norm_scale
        den = _guarded(z, x.normalizer, x.eps)
        g = g / _divisor(den, x.scale)
    elif x.scale != 1.0:
        g = g * x.scale
    if needs[0] or needs_query_norm or needs_key_sum:
        t = _matmul(g, call.state.mT)
        if needs[0]:
            dquery = reduce_batch(t, x.q.shape[:-2])
    if needs_query_norm or needs_key_sum:
        dz = (t * query).sum(-1, keepdim=True) * (-x.norm_scale) / den
        if x.normalizer == "clamp":
            above = z > x.eps if clamp_is_flat_at_its_bounds() else z >= x.eps
            dz = torch.where(above, dz, 0.0)
    if needs_query_norm:
        target = x.q if x.q_norm is None else x.q_norm
        dquery_norm = reduce_batch(dz * call.key_sum.unsqueeze(-2), target.shape[:-2])
    if needs[1] or needs[2] or needs_weight:
        batch = key_batch(x.k, x.v, None, x.key_weight)
        dstate = reduce_batch(_matmul(query.mT, g), batch)
        if needs[2]:
            dvalue = reduce_batch(_matmul(_times(key, weight), dstate), x.v.shape[:-2])
        if needs[1] or needs_weight:
            u = _matmul(x.v.to(acc), dstate.mT)
        if needs[1]:
            dkey = reduce_batch(_times(u, weight), x.k.shape[:-2])
        if needs_weight:
            dweight = _reduced_weight(x, (key * u).sum(-1, keepdim=True))
    if needs_key_sum:
        batch = key_batch(x.key_norm, x.key_norm, None, x.key_weight)
        dkey_sum = reduce_batch((dz * query_norm).sum(-2, keepdim=True), batch)
        if needs_key_norm:
            dkey_norm = reduce_batch(_times(dkey_sum, weight), x.key_norm.shape[:-2])
        if needs_weight:
            share = (_key_norm(x, key) * dkey_sum).sum(-1, keepdim=True)
            dweight = _added(dweight, _reduced_weight(x, share))
    if x.q_norm is None:
        dquery, dquery_norm = _added(dquery, dquery_norm), None
    if x.k_norm is None:
        dkey, dkey_norm = _added(dkey, dkey_norm), None
    return [
        _through(x.q_map, x.q, dquery),
        _through(x.k_map, x.k, dkey),
        dvalue,
        _through(x.q_norm_map, x.q_norm, dquery_norm),
        _through(x.k_norm_map, x.k_norm, dkey_norm),
        None if dweight is None else dweight.squeeze(-1),
    ]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _through(text: str, x: Tensor | None, g: Tensor | None) -> Tensor | None:
    """The gradient of x where g, which may have fewer rows, is that of φ(x)."""
    if x is None or g is None:
        return None
    return gradient(text, x.to(g.dtype), g.expand(x.shape))


def _reduced_weight(x: Inputs, dweight: Tensor) -> Tensor:
    assert x.key_weight is not None
    return reduce_batch(dweight, x.key_weight.shape[:-1])
