"""Piecewise sparse attention in plain ATen: the CPU path, and the backward on every device.

Everything is computed in fp32 (fp64 for fp64 inputs) whatever autocast says. The selected key
blocks are gathered, a few query blocks at a time, so that no N × M matrix is ever in memory.

Names, for one head: b the block size, T keys, blocks j of len_j keys; `mean` k̄_j, `total` v̂_j = Σ v
over the block, `moment` H = Σ_j Σ_(m in j) (k_m - k̄_j)ᵀ v_m.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "block_means", "chosen_count", "forward", "select", "statistics"]

# Gathered keys and values of one step, in elements: a CPU has caches, a GPU is to be filled.
_STEP = {"cpu": 2**20, "cuda": 2**26}


def chosen_count(density: float, blocks: int) -> int:
    """⌊density · blocks⌋, at least one; 0.29 · 100 is 29 whatever binary fractions make of it."""
    return max(1, floor(density * blocks + 1e-9))


def block_lengths(rows: int, block_size: int, like: Tensor) -> Tensor:
    """The number of rows in each block, of `like`'s dtype: the last may be short."""
    starts = torch.arange(0, rows, block_size, device=like.device)
    return (rows - starts).clamp(max=block_size).to(like.dtype)


def into_blocks(x: Tensor, block_size: int) -> Tensor:
    """(*, rows, D) to (*, blocks, block_size, D), the last block filled up with zeros."""
    missing = -x.shape[-2] % block_size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(-2, (-1, block_size))


def block_means(x: Tensor, block_size: int) -> Tensor:
    """(*, rows, D) to (*, blocks, D)."""
    lengths = block_lengths(x.shape[-2], block_size, x)
    return into_blocks(x, block_size).sum(-2) / lengths[:, None]


def select(q: Tensor, k: Tensor, density: float, block_size: int, scale: float) -> Tensor:
    """(*, query blocks, key blocks), True for the blocks of the largest scale · q̄·k̄.

    Equal scores: the earlier block. Not differentiable.
    """
    q, k = q.detach().to(_wide(q.dtype)), k.detach().to(_wide(k.dtype))
    scores = block_means(q, block_size) @ block_means(k, block_size).mT * scale
    count = chosen_count(density, scores.shape[-1])
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class Statistics:
    """Of the key blocks: mean (B, J, D), total (B, J, Dv), moment (B, D, Dv), lengths (J,)."""

    mean: Tensor
    total: Tensor
    moment: Tensor
    lengths: Tensor


def statistics(keys: Tensor, values: Tensor, rows: int) -> Statistics:
    """keys (B, J, b, D) and values (B, J, b, Dv), zero beyond `rows`."""
    lengths = block_lengths(rows, keys.shape[-2], keys)
    mean = keys.sum(-2) / lengths[:, None]
    centred = keys - mean[..., None, :]  # not zero beyond `rows`, but the values are
    moment = centred.flatten(1, 2).mT @ values.flatten(1, 2)
    return Statistics(mean, values.sum(-2), moment, lengths)


@dataclass(frozen=True)
class _Step:
    """Some query blocks, their keys, and the weights that both passes need, up to `bottom`.

    query (B, I, b, D); picks (B, I, S); near (B, I, b, S·b) on the selected keys; far (B, I, b, J)
    on the other blocks; spread (B, I, b, 1) = Σ_j len_j · far_j / T; bottom (B, I, b, 1).
    """

    at: slice
    query: Tensor
    picks: Tensor
    keys: Tensor
    values: Tensor
    near: Tensor
    far: Tensor
    spread: Tensor
    bottom: Tensor


def rows_by(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, I, b, X) times (B, X, Y); a broadcast product would copy the matrix for every block."""
    return (x.flatten(1, 2) @ matrix).unflatten(1, x.shape[1:3])


def sum_by(x: Tensor, y: Tensor) -> Tensor:
    """Σ over the rows: (B, I, b, X) and (B, I, b, Y) to (B, X, Y)."""
    return x.flatten(1, 2).mT @ y.flatten(1, 2)


class _Problem:
    """The operands with the batch dims merged into one, in blocks, in wide precision."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_size: int, scale: float
    ) -> None:
        self.batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))
        self.scale, self.block_size, self.rows = scale, block_size, k.shape[-2]
        self.query, self.keys, self.values = (
            into_blocks(self.merged(t).to(_wide(t.dtype)), block_size) for t in (q, k, v)
        )
        self.chosen = self.merged(chosen)
        self.known = statistics(self.keys, self.values, self.rows)

    def merged(self, x: Tensor) -> Tensor:
        return x.expand(*self.batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])

    def steps(self) -> Iterator[_Step]:
        count = int(self.chosen[0, 0].sum())
        columns = self.keys.shape[-1] + self.values.shape[-1]
        block = self.keys.shape[0] * count * self.block_size * columns
        each = max(1, _STEP.get(self.query.device.type, 2**24) // block)
        for start in range(0, self.query.shape[1], each):
            yield self._step(slice(start, start + each), count)

    def _step(self, at: slice, count: int) -> _Step:
        known, query, chosen = self.known, self.query[:, at], self.chosen[:, at]
        picks = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        picks = picks[..., :count]
        heads = torch.arange(picks.shape[0], device=picks.device)[:, None, None]
        keys = self.keys[heads, picks].flatten(2, 3)
        values = self.values[heads, picks].flatten(2, 3)
        near = (self.scale * query) @ keys.mT
        if self.rows % self.block_size:
            inside = torch.arange(self.block_size, device=picks.device)
            inside = inside < known.lengths[picks][..., None]
            near = near.masked_fill_(~inside.flatten(-2)[:, :, None], -torch.inf)
        far = rows_by(self.scale * query, known.mean.mT)
        far = far.masked_fill_(chosen[:, :, None], -torch.inf)
        top = torch.maximum(near.amax(-1, keepdim=True), far.amax(-1, keepdim=True))
        near, far = near.sub_(top).exp_(), far.sub_(top).exp_()
        whole = (far @ known.lengths)[..., None]
        bottom = near.sum(-1, keepdim=True) + whole
        return _Step(at, query, picks, keys, values, near, far, whole / self.rows, bottom)

    def output(self, step: _Step) -> Tensor:
        known = self.known
        first = rows_by(step.query, known.moment)
        zeroth = step.near @ step.values + rows_by(step.far, known.total)
        return (zeroth + self.scale * step.spread * first) / step.bottom


def forward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_size: int, scale: float
) -> Tensor:
    """The output (*batch, N, Dv) in wide precision, for the selection `chosen`."""
    problem = _Problem(q, k, v, chosen, block_size, scale)
    out = torch.cat([problem.output(step) for step in problem.steps()], 1)
    return out.flatten(1, 2)[:, : q.shape[-2]].reshape(*problem.batch, q.shape[-2], v.shape[-1])


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in wide precision, with the selection held constant."""
    problem = _Problem(q, k, v, chosen, block_size, scale)
    known, rows = problem.known, problem.rows
    incoming = into_blocks(problem.merged(do).to(problem.query.dtype), block_size)
    heads = torch.arange(incoming.shape[0], device=do.device)[:, None, None]
    dq, dkeys, dvalues = (
        torch.zeros_like(x) for x in (problem.query, problem.keys, problem.values)
    )
    dmean, dtotal, dmoment = (torch.zeros_like(x) for x in (known.mean, known.total, known.moment))
    for step in problem.steps():
        g, query, over = incoming[:, step.at], step.query, 1 / step.bottom
        delta = (g * problem.output(step)).sum(-1, keepdim=True)
        weights, far_weights, spread = step.near * over, step.far * over, step.spread * over
        near = weights * (g @ step.values.mT - delta)
        # Each unselected block weighs in by its total, by the first-order term, and below the line.
        along = (g * rows_by(query, known.moment)).sum(-1, keepdim=True) * (scale / rows)
        far = far_weights * (rows_by(g, known.total.mT) + (along - delta) * known.lengths)
        dq[:, step.at] = scale * (near @ step.keys + rows_by(far, known.mean))
        dq[:, step.at] += scale * spread * rows_by(g, known.moment.mT)
        dmean += scale * sum_by(far, query)
        dtotal += sum_by(far_weights, g)
        dmoment += scale * sum_by(spread * query, g)
        # index_put_ and not index_add_: the sum has a fixed order on CUDA too.
        blocks = (*step.picks.shape, block_size)
        for gradient, by_query in (
            (dkeys, scale * (near.mT @ query)),
            (dvalues, weights.mT @ g),
        ):
            gradient.index_put_((heads, step.picks), by_query.reshape(*blocks, -1), accumulate=True)
    centred = problem.keys - known.mean[..., None, :]
    dvalues += dtotal[..., None, :] + centred @ dmoment[:, None]
    dcentred = problem.values @ dmoment.mT[:, None]
    dmean -= dcentred.sum(-2)
    dkeys += dcentred + (dmean / known.lengths[:, None])[..., None, :]
    like = (q, k, v)
    grads = (dq, dkeys, dvalues)
    dq, dk, dv = (
        _summed(g.flatten(1, 2)[:, : x.shape[-2]], x, problem.batch)
        for g, x in zip(grads, like, strict=True)
    )
    return dq, dk, dv


def _summed(grad: Tensor, like: Tensor, batch: Sequence[int]) -> Tensor:
    """The batch dims apart again, those that were broadcast summed."""
    grad = grad.reshape(*batch, *grad.shape[-2:])
    return grad.sum_to_size(like.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
