"""Programs that are easily misread: what is there twice, what is written where no schema says so,
numbers that a dtype does not have, memory that is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Inputs = Callable[[], list[Tensor]]
MISREAD: list[tuple[Callable[..., Any], Inputs, int]] = []


def tensors(
    *more: tuple[int, ...], grad: bool = True, dtype: torch.dtype = torch.float64
) -> Inputs:
    shapes = ((2, 6, 4), (2, 6, 4), (2, 6, 4), *more)
    return lambda: [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


def program(inputs: Inputs, matches: int) -> Callable[[Any], Any]:
    """matches: how many attentions there are, with rewrite="always"."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        MISREAD.append((function, inputs, matches))
        return function

    return add


# Twice


@program(tensors((6,)), 1)
def weights_twice_above_once_below(q, k, v, w):
    scores = q.exp() @ k.exp().mT
    return (scores * w * w) @ v / ((scores * w).sum(-1, keepdim=True) + 1e-3)


@program(tensors((4,)), 1)
def features_weighted_twice_above_once_below(q, k, v, w):
    q, k = q.exp(), k.exp()
    state, z = (k.mT @ v) * w[:, None] * w[:, None], k.sum(-2) * w
    return q @ state / (q @ z.unsqueeze(-1) + 1e-3)


# Written, and read before


@program(tensors((2, 6, 4), grad=False), 0)
def written_in_a_checkpoint(q, k, v, buffer):
    state = buffer.mT @ v

    def body(x):
        buffer.add_(1)
        return x * 2

    return checkpoint(body, q, use_reentrant=False) @ state


def written_in_a_branch(q, k, v, buffer):
    def yes(x, b):
        b.add_(1)
        return x * 2

    def no(x, b):
        b.sub_(1)
        return x * 3

    with torch.no_grad():
        state = buffer.relu().mT @ v
        return torch.cond(q.sum() > 0, yes, no, (q, buffer)) @ state


if torch.__version__ >= "2.13":  # torch 2.11 has no branches that write
    program(tensors((2, 6, 4), grad=False), 0)(written_in_a_branch)


class RunningVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q.exp() @ k.exp().mT * self.norm.running_var
        normed = self.norm(v)
        return scores @ v, normed


@program(tensors(), 0)
def running_statistics(q, k, v):
    return RunningVariance()(q, k, v)


@program(tensors(), 0)
def a_transposed_state_added_to(q, k, v):
    state = k[:, :2].mT @ v[:, :2]
    state.mT.add_(k[:, 2:4].mT @ v[:, 2:4])
    return q @ (state + k[:, 4:].mT @ v[:, 4:])


@program(tensors(), 0)
def a_view_of_the_state_added_to_twice(q, k, v):
    state = k[:, :2].mT @ v[:, :2]
    state.view_as(state).add_(k[:, 2:4].mT @ v[:, 2:4], alpha=2)
    return q @ (state + k[:, 4:].mT @ v[:, 4:])


# Numbers that a dtype does not have


@program(tensors(), 1)
def integers_filled_with_a_fraction(q, k, v):
    return q @ ((k * torch.full((6, 1), 2.7, dtype=torch.int64)).mT @ v)


@program(tensors(), 1)
def booleans_filled_with_a_number(q, k, v):
    return q @ ((k * torch.ones(6, 1, dtype=torch.bool).fill_(3)).mT @ v)


@program(tensors(), 0)
def positions_over_a_fraction(q, k, v):
    block = torch.arange(4) // 2.5
    return q @ ((k.mT @ v) * (block[:, None] == block))


def wide() -> list[Tensor]:
    return [torch.randn(5, 512, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@program(wide, 0)
def positions_that_bfloat16_does_not_have(q, k, v):
    block = torch.arange(512).bfloat16() // 4
    return q @ ((k.mT @ v) * (block[:, None] == block))


@program(tensors(dtype=torch.float32), 1)
def narrow_tensors_contracted_in_fp64(q, k, v):
    return q.double() @ (k.double().mT @ v.double())


@program(tensors((6, 4), dtype=torch.float32), 1)
def a_mean_in_fp32_beside_products_in_fp64(q, k, v, x):
    q = q.double() * x.mean(-2, keepdim=True).double()
    return q @ (k.double().mT @ v.double())


LARGE = torch.tensor([2**24 + 1, 2**24 + 3, 2**24 + 5, -(2**24) - 1, 2**25 + 1, 3])


@program(tensors(), 1)
def weights_above_what_fp32_counts(q, k, v):
    return (q.exp() @ k.exp().mT * LARGE) @ v


@program(tensors(), 1)
def times_infinity(q, k, v):
    return q @ ((k * float("inf")).mT @ v)


@program(tensors(grad=False), 1)
def features_without_a_number_masked_in_the_state(q, k, v):
    gone = torch.tensor([False, True, False, False])
    k = k + torch.where(gone, torch.nan, 0.0)
    return q @ (k.mT @ v).masked_fill(gone[:, None], 0)


# Where a derivative jumps


def padded() -> list[Tensor]:
    q, k = (torch.rand(2, 6, 4, dtype=torch.float64) + 0.1 for _ in range(2))
    k[:, 4:] = 0
    return [q.requires_grad_(), k.requires_grad_(), torch.randn_like(q).requires_grad_()]


@program(padded, 0 if torch.__version__ < "2.14" else 1)
def sums_of_sizes_that_are_zero(q, k, v):
    return F.normalize(q.clamp(min=0) @ k.clamp(min=0).mT, p=1, dim=-1) @ v


def counted() -> list[Tensor]:
    """q·Σk is 4 everywhere."""
    q, k = torch.zeros(2, 2, 6, 4, dtype=torch.float64).unbind()
    q[..., 0], k[:, :4, 0] = 1, 1
    return [q.requires_grad_(), k.requires_grad_(), torch.randn_like(q).requires_grad_()]


def divided(q, k, v, guard):
    return q @ (k.mT @ v) / guard(q @ k.sum(-2).unsqueeze(-1))


@program(counted, 1)
def a_count_clamped(q, k, v):
    return divided(q, k, v, lambda z: z.clamp(min=4))


@program(counted, 1)
def the_larger_of_a_count_and_a_number(q, k, v):
    return divided(q, k, v, lambda z: torch.maximum(z, torch.full_like(z, 4.0)))


@program(counted, 1)
def a_count_kept_above_a_number(q, k, v):
    return divided(q, k, v, lambda z: torch.where(z > 4.0, z, 4.0))


@program(counted, 1)
def a_count_filled_up_to_a_number(q, k, v):
    return divided(q, k, v, lambda z: z.masked_fill(z <= 4.0, 4.0))


@program(counted, 1)
def a_count_filled_below_a_number(q, k, v):
    return divided(q, k, v, lambda z: z.masked_fill(z < 4.0, 4.0))


# Memory


@program(tensors((2, 6, 4), grad=False), 0)
def added_into_an_argument(q, k, v, out):
    return out.baddbmm_(q, k.mT @ v)


@program(tensors((2, 6, 4), grad=False), 0)
def computed_into_an_argument(q, k, v, out):
    return torch.matmul(q, k.mT @ v, out=out)


@program(tensors(grad=False), 1)
def assigned_and_returned_in_two_layouts(q, k, v):
    out = torch.empty_like(v)
    out[...] = q @ (k.mT @ v)
    return out.mT, out


@program(tensors(), 1)
def modified_in_another_layout(q, k, v):
    out = torch.einsum("bnc,bcd->dbn", q, k.mT @ v)
    out.mul_(0.5)
    return out


def square() -> list[Tensor]:
    return [torch.randn(2, 4, 4) for _ in range(3)]


@program(tensors((2, 6, 4)), 1)
def made_without_gradients_and_written_with_them(q, k, v, w):
    with torch.no_grad():
        out = (q @ (k.mT @ v)).mT.contiguous()
    out.mul_(w.mT)
    return out


@program(square, 0)
def transposed_in_place(q, k, v):
    out = q @ (k.mT @ v)
    out.transpose_(1, 2)
    return out


# Random numbers that are drawn for nothing


@program(tensors(), 1)
def noise_that_is_cut_off(q, k, v):
    noise = torch.randn(2, 6, 1, dtype=v.dtype)
    return (q @ (k.mT @ torch.cat([v, noise], -1)))[..., :-1] * 2


@program(tensors(), 1)
def dropout_that_is_off(q, k, v):
    return q @ F.dropout(k.mT @ v, 0.3, training=False) + F.dropout(v, 0.0)
