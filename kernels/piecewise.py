"""Host side of piecewise sparse attention: batch dims, buffers, launch parameters, launches.

    means → statistics → combine → scores (a batched product of means) → select → attention

The arguments are checked in bla_inductor/ops/piecewise.py, and every tensor has elements. Nothing
waits for the GPU, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from functools import cache

import torch
from bla_inductor.kernels import heuristics, launching
from bla_inductor.kernels.batch import Batch, Strides
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.kernels.piecewise_attention import attention_kernel
from bla_inductor.kernels.piecewise_statistics import (
    combine_kernel,
    means_kernel,
    select_kernel,
    statistics_kernel,
)
from torch import Tensor

__all__ = ["forward"]


def forward(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, count: int, block_size: int, scale: float
) -> Tensor:
    """Write `out` (*batch, N, Dv), of any strides; the selection (*batch, query blocks, blocks).

    q, k, v broadcast to out's batch; `count` key blocks are selected by each query block.
    """
    batch, N, M, D, DV = out.shape[:-2], q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    operands = Batch(batch, (q, k, v), (out,))
    q, k, v, target = operands.tensors
    qs, ks, vs, os = operands.strides
    heads, inner = operands.count, operands.inner
    query_blocks, blocks = -(-N // block_size), -(-M // block_size)
    with launching.on(q.device):
        k_low, v_low, k_means, moment, factors = _statistics(
            k, v, (heads, inner, M, D, DV), (ks, vs), block_size
        )
        chosen, picks = _select(q, k_means, (heads, inner, N, D), qs, count, block_size)
        tile = _attention_tile(D, DV, block_size, heuristics.capability(q.device))
        programs = -(-N // tile.BLOCK_N)
        launching.run(
            attention_kernel, heads * programs,
            q, k, v, target, k_low, v_low, moment, factors, picks, chosen,
            N, M, programs, query_blocks, blocks, count, inner, scale, *qs, *ks, *vs, *os,
            tile=tile, D=D, DV=DV, BLOCK_D=tile.BLOCK_D, BLOCK_V=tile.BLOCK_V, BLOCK=block_size,
            TILE_Q=tile.BLOCK_N, TILE=tile.BLOCK_DN, EVEN=M % block_size == 0,
        )  # fmt: skip
        operands.finish()
    return chosen.view(torch.bool).view(*batch, query_blocks, blocks)


def _statistics(
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, ...],
    strides: tuple[Strides, Strides],
    block_size: int,
) -> tuple[Tensor, ...]:
    """Means of keys and values in their dtype, those of the keys in fp32 too; the moment over M
    with the factor of each column.
    """
    heads, inner, M, D, DV = sizes
    blocks = -(-M // block_size)
    tile = _statistics_tile(D, DV, block_size)
    tiles = -(-DV // tile.BLOCK_V)
    each, splits = _divided(blocks, heads * tiles, D * DV, k.device)
    k_means = k.new_empty(heads, blocks, D, dtype=torch.float32)
    k_low, v_low = k.new_empty(heads, blocks, D), v.new_empty(heads, blocks, DV)
    partial = k.new_empty(heads, splits, D, DV, dtype=torch.float32)
    launching.run(
        statistics_kernel, heads * splits * tiles,
        k, v, k_means, k_low, v_low, partial, M, blocks, splits, each, inner,
        *strides[0], *strides[1], tile=tile, D=D, DV=DV, BLOCK_D=tile.BLOCK_D,
        BLOCK_V=tile.BLOCK_V, BLOCK=block_size, TILE=tile.BLOCK_N,
    )  # fmt: skip
    moment = k.new_empty(heads, D, DV)
    factors = k.new_empty(heads, DV, dtype=torch.float32)
    columns = Tile(0, tile.BLOCK_D, 16, 0, 4, 1)
    launching.run(
        combine_kernel, heads * -(-DV // columns.BLOCK_V),
        partial, moment, factors, splits, M,
        tile=columns, D=D, DV=DV, BLOCK_D=columns.BLOCK_D, BLOCK_V=columns.BLOCK_V,
    )  # fmt: skip
    return k_low, v_low, k_means, moment, factors


def _select(
    q: Tensor,
    k_means: Tensor,
    sizes: tuple[int, ...],
    strides: Strides,
    count: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Bytes (heads, query blocks, blocks), one where selected, and the places of the ones."""
    heads, inner, N, D = sizes
    query_blocks, blocks = -(-N // block_size), k_means.shape[1]
    rows = Tile(block_size, heuristics.block(D), 0, 0, 4, 1)
    q_means = q.new_empty(heads, query_blocks, D, dtype=torch.float32)
    launching.run(
        means_kernel, heads * query_blocks, q, q_means, N, query_blocks, inner, *strides,
        tile=rows, D=D, BLOCK_D=rows.BLOCK_D, BLOCK=block_size,
    )  # fmt: skip
    scores = torch.bmm(q_means, k_means.mT)
    chosen = scores.new_empty(scores.shape, dtype=torch.uint8)
    picks = scores.new_empty(heads, query_blocks, count, dtype=torch.int32)
    launching.run(
        select_kernel, heads * query_blocks, scores, chosen, picks, blocks, count,
        tile=rows, WIDTH=heuristics.block(blocks),
    )  # fmt: skip
    return chosen, picks


@cache
def _attention_tile(D: int, DV: int, block_size: int, capability: int) -> Tile:
    """BLOCK_N queries by BLOCK_DN keys or block means; BLOCK_D and BLOCK_V whole.

    Every row compiles without spills in tests/kernels; before sm_90 it also fits the 99 KiB of
    shared memory of sm_86 and sm_89.
    """
    d, e = heuristics.block(D), heuristics.block(DV)
    width = max(d, e)
    rows = min(block_size, 128 if width <= 64 else 64)
    keys = min(block_size, 64 if capability >= 9 else 32)
    large = rows > 64 or (rows > 16 and width > 128) or (capability < 9 and rows * width > 4096)
    warps = 8 if large else 2 if rows == 16 and width <= 128 else 4
    return Tile(rows, d, e, keys, warps, 3 if capability >= 9 and width <= 128 else 2)


@cache
def _statistics_tile(D: int, DV: int, block_size: int) -> Tile:
    """The moment's BLOCK_D × BLOCK_V in registers, beside the two tiles that it is made of."""
    d = heuristics.block(D)
    v = min(heuristics.block(DV), 16384 // d, 128)
    return Tile(min(block_size, 64), d, v, 0, 4 if d * v <= 4096 else 8, 2)


def _divided(blocks: int, programs: int, state: int, device: torch.device) -> tuple[int, int]:
    """(blocks a program, programs along the sequence): enough for four programs a multiprocessor,
    two where the partial sums are large, but at least four blocks each to be worth writing them.
    """
    slots = (4 if state <= 4096 else 2) * heuristics.multiprocessors(device)
    splits = max(1, min(-(-slots // programs), blocks // 4))
    each = -(-blocks // splits)
    return each, -(-blocks // each)
