"""Host side: batch dims to two strides a tensor, buffers for the partial sums, and the launches.

Shapes as in `bla_inductor.ops`. The arguments are checked there, and every tensor has elements.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import prod
from typing import Any

import torch
from bla_inductor.kernels import heuristics
from bla_inductor.kernels.backward import key_pass_kernel, query_pass_kernel
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.kernels.output import output_kernel
from bla_inductor.kernels.precision import backward_precision, output_precision, state_precision
from bla_inductor.kernels.state import state_kernel, sum_splits
from bla_inductor.kernels.wide import wide_query_kernel
from torch import Tensor

Strides = tuple[int, ...]


class Batch:
    """The operands of one pass, with the batch dims merged into two: batch index b is (b // inner,
    b % inner).

    Dims that do not merge (three and more unrelated strides) are resolved by contiguous copies;
    `finish` copies the outputs back.
    """

    def __init__(
        self, sizes: Sequence[int], reads: Sequence[Tensor], writes: Sequence[Tensor] = ()
    ) -> None:
        self.reads, self.writes = list(reads), list(writes)
        self._targets: list[Tensor] = []
        merged = _merge(sizes, [*reads, *writes])
        if merged is None:
            rank = len(sizes)
            self._targets = self.writes
            self.reads = [
                t.expand(*sizes, *t.shape[rank:]).reshape(-1, *t.shape[rank:]) for t in reads
            ]
            self.writes = [t.new_empty(prod(sizes), *t.shape[rank:]) for t in writes]
            sizes = [prod(sizes)]
            merged = _merge(sizes, [*self.reads, *self.writes])
            assert merged is not None
        self.count, self.inner, pairs = merged
        rank = len(sizes)
        # The two batch strides, then the tensor's own.
        self.strides: list[Strides] = [
            (*pair, *t.stride()[rank:])
            for pair, t in zip(pairs, [*self.reads, *self.writes], strict=True)
        ]

    def finish(self) -> None:
        for target, temporary in zip(self._targets, self.writes, strict=False):
            target.copy_(temporary.view(target.shape))


def _merge(
    sizes: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[int, int, list[tuple[int, int]]] | None:
    merged: list[tuple[int, list[int]]] = []
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        strides = [0 if t.shape[i] == 1 else t.stride(i) for t in tensors]
        if merged and all(a == b * size for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, [0] * len(tensors)))
    (outer, outer_strides), (inner, inner_strides) = merged
    return outer * inner, inner, list(zip(outer_strides, inner_strides, strict=True))


def _big(tile: Tile, strides: Sequence[Strides]) -> bool:
    """Whether an offset within one tile may leave int32."""
    return any(tile.BLOCK_N * abs(s[2]) + 256 * abs(s[3]) >= 2**31 for s in strides if len(s) == 4)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _sum_splits(partial: Tensor, state: Tensor, key_sum: Tensor, splits: int) -> None:
    batch = state.numel() // (state.shape[-1] * state.shape[-2])
    state_size, sum_size = state.numel() // batch, key_sum.numel() // batch
    size = 512
    grid = (batch * (-(-(state_size + sum_size) // size)),)
    sum_splits[grid](
        partial, state, key_sum, splits, STATE_SIZE=state_size, SUM_SIZE=sum_size, BLOCK=size
    )


def _statistics(
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    batch: Sequence[int],
    normalized: bool,
    precision: str,
    weights: tuple[Tensor, Tensor] | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """state (*batch, D, Dv) = Σ kᵀ(a·v) and key_sum (*batch, D') = Σ b·k', fp32; `weights` are a, b
    (*batch, M).
    """
    M, D, DV = k.shape[-2], k.shape[-1], v.shape[-1]
    feature = k if k_norm is None else k_norm
    DN = feature.shape[-1]
    state = k.new_empty([*batch, D, DV], dtype=torch.float32)
    key_sum = k.new_empty([*batch, DN] if normalized else [0], dtype=torch.float32)
    tile = heuristics.state_tile(D, DV, DN, precision, heuristics.capability(k.device))
    operands = Batch(batch, (k, v, feature))
    tiles = -(-DV // tile.BLOCK_V)
    rows, splits = heuristics.divide_rows(M, operands.count * tiles, tile, k.device)
    sum_size = DN if normalized else 0
    out_state, out_sum, state_stride, sum_stride = state, key_sum, D * DV, DN
    if splits > 1:
        out_state = k.new_empty(operands.count * splits, D * DV + sum_size, dtype=torch.float32)
        out_sum = out_state[:, D * DV :] if normalized else key_sum
        state_stride = sum_stride = D * DV + sum_size
    a, b = weights or (state, state)
    state_kernel[(operands.count * splits * tiles,)](
        *operands.reads,
        a,
        b,
        out_state,
        out_sum,
        M,
        rows,
        splits,
        operands.inner,
        *operands.strides[0],
        *operands.strides[1],
        *operands.strides[2],
        state_stride,
        sum_stride,
        D=D,
        DV=DV,
        DN=DN,
        NORM="none" if not normalized else "coupled" if k_norm is None else "decoupled",
        WEIGHTED=weights is not None,
        EXACT=exact,
        PRECISION=precision,
        BIG=_big(tile, operands.strides),
        **asdict(tile),
    )
    if splits > 1:
        _sum_splits(out_state, state, key_sum, splits)
    return state, key_sum


def _apply_state(
    out: Tensor,
    x: Tensor,
    x_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor | None,
    bias: Tensor | None,
    normalizer: str,
    numbers: tuple[float, float, float],
    precision: str,
) -> None:
    """out = x·state, normalised and scaled, plus bias; `out` has the full batch of this product."""
    N, D, DV = x.shape[-2], x.shape[-1], state.shape[-1]
    feature = x if x_norm is None else x_norm
    DN = feature.shape[-1]
    vector = bias if key_sum is None else key_sum
    batch = out.shape[:-2]
    tile = heuristics.output_tile(D, DV, DN, precision)
    reads = [x, feature, state] + ([] if vector is None else [vector])
    operands = Batch(batch, reads, [out])
    tiles = -(-DV // tile.BLOCK_V)
    rows, chunks = heuristics.divide_rows(N, operands.count * tiles, tile, x.device)
    x, feature, state = operands.reads[:3]
    vector = state if vector is None else operands.reads[3]
    vector_strides = operands.strides[3][:2] if len(reads) == 4 else (0, 0)
    output_kernel[(operands.count * chunks * tiles,)](
        x,
        feature,
        operands.writes[0],
        state,
        vector,
        vector,
        N,
        rows,
        chunks,
        operands.inner,
        *numbers,
        *operands.strides[0],
        *operands.strides[1],
        *operands.strides[-1],
        *operands.strides[2],
        *vector_strides,
        D=D,
        DV=DV,
        DN=DN,
        NORMALIZER=normalizer,
        DECOUPLED=x_norm is not None,
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        BIG=_big(tile, [operands.strides[i] for i in (0, 1, -1)]),
        **asdict(tile),
    )
    operands.finish()


def forward(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    batch: Sequence[int],
    normalizer: str,
    scale: float,
    norm_scale: float,
    eps: float,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write `out` (any strides); return state and key_sum, fp32, with the key side's `batch`."""
    normalized = normalizer != "none"
    decoupled = q_norm is not None or k_norm is not None
    with _on(q.device):
        precision = state_precision(k.dtype, out.dtype)
        exact = precision == "native" and out.dtype == torch.float32
        state, key_sum = _statistics(k, v, k_norm, batch, normalized, precision, exact=exact)
        _apply_state(
            out,
            q,
            q_norm if q_norm is not None or not decoupled else q,
            state,
            key_sum if normalized else None,
            None,
            normalizer,
            (scale, norm_scale, eps),
            output_precision(q.dtype, out.dtype, upcast=upcast),
        )
    return state, key_sum


class _Gradients:
    """Buffers with a pass's full batch for gradients whose input was broadcast, summed into them at
    the end.
    """

    def __init__(self, batch: Sequence[int]) -> None:
        self._batch = list(batch)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def full(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or list(grad.shape[:-2]) == self._batch:
            return grad
        buffer = grad.new_empty([*self._batch, *grad.shape[-2:]], dtype=torch.float32)
        self._pending.append((grad, buffer))
        return buffer

    def finish(self) -> None:
        for grad, buffer in self._pending:
            dims = [i for i, s in enumerate(grad.shape[:-2]) if s != self._batch[i]]
            grad.copy_(buffer.sum(dims, keepdim=True))


def backward(
    grads: Sequence[Tensor | None],
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
    upcast: bool = False,
) -> None:
    """Write the gradients of q, k, v, q_norm, k_norm that are not None (any strides, the inputs'
    shapes).
    """
    numbers = (scale, norm_scale, eps)
    precision = backward_precision(q.dtype, do.dtype, upcast=upcast)
    DN = (q if q_norm is None else q_norm).shape[-1]
    capability = heuristics.capability(q.device)
    wide = heuristics.wide_backward(q.shape[-1], v.shape[-1], DN, precision, capability)
    fused = heuristics.fused_query_pass(q.shape[-1], v.shape[-1], precision, capability)
    normalized = normalizer != "none"
    dq, dk, dv, dq_norm, dk_norm = grads
    needs_dsum = normalized and (dk_norm is not None or (dk is not None and k_norm is None))
    needs_dstate = dk is not None or dv is not None
    with _on(q.device):
        gradients = _Gradients(do.shape[:-2])
        query_pass = _query_pass_wide if wide else _query_pass
        dstate, dsum = query_pass(
            gradients.full(dq), gradients.full(dq_norm), do, q, q_norm, state, key_sum,
            normalizer, numbers, precision, needs_dstate, needs_dsum, fused,
        )  # fmt: skip
        gradients.finish()
        if not needs_dstate and not needs_dsum:
            return
        batch = state.shape[:-2]
        gradients = _Gradients(batch)
        key_pass = _key_pass_wide if wide else _key_pass
        key_pass(
            gradients.full(dk), gradients.full(dv), gradients.full(dk_norm), k, v,
            dstate, dsum if normalized else None, k_norm is None, precision,
        )  # fmt: skip
        gradients.finish()


def _reduced(x: Tensor, batch: Sequence[int]) -> Tensor:
    """x with the batch dims that `batch` broadcasts summed, in torch's fixed order."""
    dims = [i for i, size in enumerate(batch) if size != x.shape[i]]
    return x.sum(dims, keepdim=True) if dims else x


def _weighted_statistics(
    q: Tensor,
    do: Tensor,
    q_norm: Tensor | None,
    key_batch: Sequence[int],
    normalized: bool,
    precision: str,
    weights: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """dstate = Σ_n q (w·do) and dkey_sum = Σ_n dz·q', with the state's batch."""
    dstate, dsum = _statistics(q, do, q_norm, do.shape[:-2], normalized, precision, weights)
    return _reduced(dstate, key_batch), _reduced(dsum, key_batch) if normalized else dsum


def _query_pass(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    normalizer: str,
    numbers: tuple[float, float, float],
    precision: str,
    needs_dstate: bool,
    needs_dsum: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Write dq, dq_norm; return dstate and dkey_sum with the state's batch (unwritten where not
    needed).

    Unfused, the kernel leaves the sums to `_statistics`.
    """
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    normalized = normalizer != "none"
    feature = q if q_norm is None else q_norm
    DN = feature.shape[-1]
    batch = do.shape[:-2]
    key_batch = state.shape[:-2]
    tile = heuristics.query_pass_tile(D, DV, DN, precision)
    needs_sums = needs_dstate or needs_dsum
    weights = None
    if needs_sums and not fused:
        weight = q.new_empty([*batch, N], dtype=torch.float32)
        weights = (weight, torch.empty_like(weight) if normalized else weight)
        if not normalized:
            weight.fill_(numbers[0])
    vector = key_sum if normalized else state[..., 0]
    writes = [t for t in (dq, dq_norm) if t is not None]
    operands = Batch(batch, (do, q, feature, state, vector), writes)
    rows, splits = heuristics.divide_rows(N, operands.count, tile, q.device)
    sum_size = DN if normalized else 0
    dstate = q.new_empty([*key_batch, D, DV], dtype=torch.float32)
    dsum = q.new_empty([*key_batch, DN] if normalized else [0], dtype=torch.float32)
    direct = weights is not None or (splits == 1 and key_batch == batch)
    out_state, out_sum, state_stride, sum_stride = dstate, dsum, D * DV, DN
    if not direct:
        width = D * DV + sum_size
        out_state = q.new_empty([*batch, splits, width], dtype=torch.float32)
        out_sum = out_state[..., D * DV :] if normalized else dsum
        state_stride = sum_stride = width
    strides = list(operands.strides)
    dq_target = dqn_target = q
    dq_strides: Strides = (0, 0, 0, 0)
    dqn_strides: Strides = (0, 0, 0, 0)
    written = list(zip(operands.writes, strides[5:], strict=True))
    if dq is not None:
        dq_target, dq_strides = written.pop(0)
    if dq_norm is not None:
        dqn_target, dqn_strides = written.pop(0)
    query_pass_kernel[(operands.count * splits,)](
        *operands.reads[:3],
        dq_target,
        dqn_target,
        *operands.reads[3:],
        out_state,
        out_sum,
        *(weights or (out_state, out_state)),
        N,
        rows,
        splits,
        operands.inner,
        *numbers,
        *strides[0],
        *strides[1],
        *strides[2],
        *dq_strides,
        *dqn_strides,
        *strides[3][:2],
        *strides[4][:2],
        state_stride,
        sum_stride,
        D=D,
        DV=DV,
        DN=DN,
        NORMALIZER=normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        NEED_DSTATE=needs_dstate and fused,
        NEED_DSUM=needs_dsum and fused,
        STORE_WEIGHTS=weights is not None,
        PRECISION=precision,
        BIG=_big(tile, [*strides[:3], dq_strides, dqn_strides]),
        **asdict(tile),
    )
    operands.finish()
    if weights is not None:
        return _weighted_statistics(q, do, q_norm, key_batch, normalized, precision, weights)
    if not direct and needs_sums:
        partial = _reduced(out_state, key_batch)
        _sum_splits(partial, dstate, dsum, splits)
    return dstate, dsum


def _query_pass_wide(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    normalizer: str,
    numbers: tuple[float, float, float],
    precision: str,
    needs_dstate: bool,
    needs_dsum: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """As `_query_pass`, in two kernels."""
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    normalized = normalizer != "none"
    feature = q if q_norm is None else q_norm
    batch = do.shape[:-2]
    tile = heuristics.wide_query_tile(precision)
    vector = key_sum if normalized else state[..., 0]
    writes = [t for t in (dq, dq_norm) if t is not None]
    operands = Batch(batch, (do, q, feature, state, vector), writes)
    weight = q.new_empty([*batch, N], dtype=torch.float32)
    dz = torch.empty_like(weight) if normalized else weight
    strides = operands.strides
    dq_target = dqn_target = q
    dq_strides: Strides = (0, 0, 0, 0)
    dqn_strides: Strides = (0, 0, 0, 0)
    written = list(zip(operands.writes, strides[5:], strict=True))
    if dq is not None:
        dq_target, dq_strides = written.pop(0)
    if dq_norm is not None:
        dqn_target, dqn_strides = written.pop(0)
    blocks = -(-N // tile.BLOCK_N)
    wide_query_kernel[(operands.count * blocks,)](
        *operands.reads[:3],
        dq_target,
        dqn_target,
        *operands.reads[3:],
        weight,
        dz,
        N,
        blocks,
        operands.inner,
        *numbers,
        *strides[0],
        *strides[1],
        *strides[2],
        *dq_strides,
        *dqn_strides,
        *strides[3][:2],
        *strides[4][:2],
        D=D,
        DV=DV,
        DN=feature.shape[-1],
        BLOCK_C=tile.BLOCK_D,
        BLOCK_V=tile.BLOCK_V,
        BLOCK_N=tile.BLOCK_N,
        NORMALIZER=normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        PRECISION=precision,
        BIG=_big(tile, [*strides[:3], dq_strides, dqn_strides]),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    operands.finish()
    if not needs_dstate and not needs_dsum:
        return weight, weight
    key_batch = state.shape[:-2]
    return _weighted_statistics(q, do, q_norm, key_batch, normalized, precision, (weight, dz))


def _key_pass(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    k: Tensor,
    v: Tensor,
    dstate: Tensor,
    dsum: Tensor | None,
    coupled: bool,
    precision: str,
) -> None:
    """Write dk, dv, dk_norm."""
    M, D, DV = k.shape[-2], k.shape[-1], v.shape[-1]
    DN = D if dsum is None else dsum.shape[-1]
    tile = heuristics.key_pass_tile(D, DV, DN, precision)
    vector = dstate[..., 0] if dsum is None else dsum
    outputs = (dk, dv, dk_norm)
    operands = Batch(
        dstate.shape[:-2], (k, v, dstate, vector), [t for t in outputs if t is not None]
    )
    rows, chunks = heuristics.divide_rows(M, operands.count, tile, k.device)
    written = iter(zip(operands.writes, operands.strides[4:], strict=True))
    targets: list[Tensor] = []
    target_strides: list[Strides] = []
    for t in outputs:
        target, strides = (k, (0, 0, 0, 0)) if t is None else next(written)
        targets.append(target)
        target_strides.append(strides)
    key_strides, value_strides, state_strides, vector_strides = operands.strides[:4]
    key_pass_kernel[(operands.count * chunks,)](
        *operands.reads[:2],
        *targets,
        *operands.reads[2:],
        M,
        rows,
        chunks,
        operands.inner,
        *key_strides,
        *value_strides,
        *target_strides[0],
        *target_strides[1],
        *target_strides[2],
        *state_strides[:2],
        *vector_strides[:2],
        D=D,
        DV=DV,
        DN=DN,
        NEED_DK=dk is not None,
        NEED_DV=dv is not None,
        NEED_DKN=dk_norm is not None,
        ADD_DSUM=coupled and dsum is not None,
        PRECISION=precision,
        BIG=_big(tile, [key_strides, value_strides, *target_strides]),
        **asdict(tile),
    )
    operands.finish()


def _key_pass_wide(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    k: Tensor,
    v: Tensor,
    dstate: Tensor,
    dsum: Tensor | None,
    coupled: bool,
    precision: str,
) -> None:
    """As `_key_pass`, with the output kernel."""
    numbers: tuple[Any, Any, Any] = (1.0, 1.0, 0.0)
    if dk is not None:
        bias = dsum if coupled else None
        _apply_state(dk, v, None, dstate.mT, None, bias, "none", numbers, precision)
    if dv is not None:
        _apply_state(dv, k, None, dstate, None, None, "none", numbers, precision)
    if dk_norm is not None and dsum is not None:
        dk_norm.copy_(dsum.unsqueeze(-2).expand(dk_norm.shape))
