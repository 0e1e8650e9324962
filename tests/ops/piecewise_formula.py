"""Piecewise sparse attention written out with dense masks, in whatever dtype the inputs have: on
fp64 inputs the oracle, on others what its user might write by hand.

`exact` is softmax attention, `block_sparse` keeps the selected blocks and drops the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.1
ROUNDINGS = 2.0  # the floor of a budget, in units of the dtype's eps


def means(x: Tensor, block_size: int) -> Tensor:
    return torch.stack([part.mean(-2) for part in x.split(block_size, -2)], -2)


def selection(q: Tensor, k: Tensor, count: int, block_size: int) -> Tensor:
    """The `count` key blocks of the largest q̄·k̄ for each query block, one by one."""
    scores = means(q, block_size) @ means(k, block_size).mT
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(count):
        best = scores.masked_fill(chosen, -torch.inf).argmax(-1, keepdim=True)
        chosen = chosen | torch.zeros_like(chosen).scatter(-1, best, True)
    return chosen


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block_size: int,
    scale: float,
    order: int = 1,
) -> Tensor:
    """The formula; order=0 without the moment, order=-1 without the other blocks altogether."""
    n, m = q.shape[-2], k.shape[-2]
    far_mask = chosen.repeat_interleave(block_size, -2)[..., :n, :]
    near_mask = far_mask.repeat_interleave(block_size, -1)[..., :m]
    near = (q @ k.mT * scale).masked_fill(~near_mask, -torch.inf)
    key_parts, value_parts = k.split(block_size, -2), v.split(block_size, -2)
    lengths = torch.tensor([p.shape[-2] for p in key_parts], dtype=q.dtype, device=q.device)
    far = (q @ means(k, block_size).mT * scale).masked_fill(far_mask, -torch.inf)
    if order < 0:
        far = torch.full_like(far, -torch.inf)
    top = torch.cat([near, far], -1).amax(-1, keepdim=True)
    near, far = (near - top).exp(), (far - top).exp()
    sums = torch.stack([p.sum(-2) for p in value_parts], -2)
    above = near @ v + far @ sums
    if order > 0:
        moment = sum(
            (a - a.mean(-2, keepdim=True)).mT @ b
            for a, b in zip(key_parts, value_parts, strict=True)
        )
        above = above + scale * ((far * lengths).sum(-1, keepdim=True) / m) * (q @ moment)
    return above / (near.sum(-1, keepdim=True) + (far * lengths).sum(-1, keepdim=True))


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


def error(got: Tensor, truth: Tensor) -> float:
    """‖got - truth‖ / ‖truth‖, infinite for anything not finite."""
    ratio = ((got.double() - truth).norm() / truth.norm()).item()
    return ratio if ratio == ratio else float("inf")


def assert_within_budget(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """No less accurate than `eager`, which is the formula in the same dtype."""
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    floor = ROUNDINGS * torch.finfo(got.dtype).eps
    budget = max(FACTOR * error(eager, truth), floor)
    assert error(got, truth) <= budget, f"error {error(got, truth):.3e}, budget {budget:.3e}"
