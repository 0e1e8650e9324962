"""The backward's launches over the queries: dq, dq', and the sums that the key side needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from bla_inductor.kernels import heuristics, launching
from bla_inductor.kernels.batch import Batch, reduced
from bla_inductor.kernels.large import for_large
from bla_inductor.kernels.launch_forward import add_splits, statistics
from bla_inductor.kernels.launching import Map, Numbers
from bla_inductor.kernels.query_pass import query_pass_kernel
from bla_inductor.kernels.wide import wide_query_kernel
from torch import Tensor


class Needs(NamedTuple):
    """Which sums over the queries the key side asks for."""

    dstate: bool
    dsum: bool


def query_pass(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    numbers: Numbers,
    precision: str,
    needs: Needs,
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """Write dq, dq_norm; return dstate and dkey_sum with the state's batch (unwritten where not
    needed).

    Where the kernel cannot hold dstate beside the state, it leaves the sums to `statistics`.
    """
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    DN = (q if q_norm is None else q_norm).shape[-1]
    batch, key_batch = do.shape[:-2], state.shape[:-2]
    capability = heuristics.capability(q.device)
    fused = heuristics.fused_query_pass(D, DV, precision, capability)
    sizes = D, DV, DN, precision, capability
    tile = heuristics.query_pass_tile(*sizes, q.dtype, q_norm is not None)
    if q_norm is None and maps[0].elementwise:
        tile = heuristics.in_two_pieces("query", q.dtype, *sizes) or tile
    if q_norm is None:
        elements = batch.numel() * N * D
        tile = for_large(
            "query", tile, sizes[:3], q.dtype, precision, capability, elements,
            (q.stride(-2), do.stride(-2)),
        )  # fmt: skip
    weights = None
    if any(needs) and not fused:
        weights = _token_weights(q, batch, numbers)
    operands = Batch(
        batch, (do, q, q_norm, state, key_sum if numbers.normalized else None), (dq, dq_norm)
    )
    rows, splits = heuristics.divide_rows(N, operands.count, tile, q.device)
    dstate = q.new_empty([*key_batch, D, DV], dtype=torch.float32)
    dsum = q.new_empty([*key_batch, DN] if numbers.normalized else [0], dtype=torch.float32)
    direct = weights is not None or (splits == 1 and key_batch == batch)
    out_state, out_sum, state_stride, sum_stride = dstate, dsum, D * DV, DN
    if not direct:
        state_stride = sum_stride = D * DV + (DN if numbers.normalized else 0)
        out_state = q.new_empty([*batch, splits, state_stride], dtype=torch.float32)
        out_sum = out_state[..., D * DV :] if numbers.normalized else dsum
    t, s = operands.tensors, operands.strides
    launching.run(
        query_pass_kernel,
        operands.count * splits,
        *(t[0], t[1], t[2], t[5], t[6], t[3], t[4]),
        out_state,
        out_sum,
        *(weights or (out_state, out_state)),
        N,
        rows,
        splits,
        operands.inner,
        *numbers.values,
        *s[0],
        *s[1],
        *s[2],
        *s[5],
        *s[6],
        *s[3][:2],
        *s[4][:2],
        state_stride,
        sum_stride,
        D=D,
        DV=DV,
        DN=DN,
        NORMALIZER=numbers.normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        NEED_DSTATE=needs.dstate and fused,
        NEED_DSUM=needs.dsum and fused,
        STORE_WEIGHTS=weights is not None,
        Q_MAP=maps[0].forward,
        Q_MAP_GRAD=maps[0].gradient,
        QN_MAP=maps[1].forward,
        QN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        REST=tile.REST,
        BIG=operands.big(tile.BLOCK_N),
        TMA=tile.TMA,
        **launching.blocks(tile),
        tile=tile,
        pdl=True,
    )
    operands.finish()
    if weights is not None:
        return _weighted_statistics(q, do, q_norm, key_batch, numbers, precision, weights, maps)
    if not direct and any(needs):
        add_splits(reduced(out_state, key_batch), dstate, dsum, splits)
    return dstate, dsum


def _token_weights(q: Tensor, batch: Sequence[int], numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Buffers for w and dz of every query, the first filled where it is a constant."""
    weight = q.new_empty([*batch, q.shape[-2]], dtype=torch.float32)
    if not numbers.normalized:
        return weight.fill_(numbers.scale), weight
    return weight, torch.empty_like(weight)


def _weighted_statistics(
    q: Tensor,
    do: Tensor,
    q_norm: Tensor | None,
    key_batch: Sequence[int],
    numbers: Numbers,
    precision: str,
    weights: tuple[Tensor, Tensor],
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """dstate = Σ_n qf (w·do) and dkey_sum = Σ_n dz·qn, with the state's batch."""
    normalized = numbers.normalized
    dstate, dsum = statistics(q, do, q_norm, do.shape[:-2], normalized, precision, maps, weights)
    return reduced(dstate, key_batch), reduced(dsum, key_batch) if normalized else dsum


def query_pass_wide(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    numbers: Numbers,
    precision: str,
    needs: Needs,
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """As `query_pass`, in two kernels."""
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    DN = (q if q_norm is None else q_norm).shape[-1]
    batch = do.shape[:-2]
    tile = heuristics.wide_query_tile(precision)
    operands = Batch(
        batch, (do, q, q_norm, state, key_sum if numbers.normalized else None), (dq, dq_norm)
    )
    weights = _token_weights(q, batch, numbers)
    blocks = -(-N // tile.BLOCK_N)
    t, s = operands.tensors, operands.strides
    launching.run(
        wide_query_kernel,
        operands.count * blocks,
        *(t[0], t[1], t[2], t[5], t[6], t[3], t[4]),
        *weights,
        N,
        blocks,
        operands.inner,
        *numbers.values,
        *s[0],
        *s[1],
        *s[2],
        *s[5],
        *s[6],
        *s[3][:2],
        *s[4][:2],
        D=D,
        DV=DV,
        DN=DN,
        BLOCK_C=tile.BLOCK_D,
        BLOCK_V=tile.BLOCK_V,
        BLOCK_N=tile.BLOCK_N,
        NORMALIZER=numbers.normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        Q_MAP=maps[0].forward,
        Q_MAP_GRAD=maps[0].gradient,
        QN_MAP=maps[1].forward,
        QN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        BIG=operands.big(tile.BLOCK_N),
        tile=tile,
        pdl=True,
    )
    operands.finish()
    if not any(needs):
        return weights
    return _weighted_statistics(q, do, q_norm, state.shape[:-2], numbers, precision, weights, maps)
