"""The products of a program: numerator and normaliser in many spellings, and what resembles them.

Operands are (*batch, N, D), (*batch, M, D), (*batch, M, Dv), with batch dims that broadcast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tests.fuzz.programs import Program

__all__ = ["miss", "normalised", "product"]


def product(p: Program, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """(q kᵀ) v or q (kᵀ v), and the state if there is one."""
    if p.spelling == "three":
        return torch.einsum("...nc,...mc,...md->...nd", q, k, v), None
    if p.order == "scores":
        scores = _contract(p, q, k, "nt")
        out = _contract(p, scores, v, "nn")
        return (out * 0.3 if p.scale == "result" else out), None
    state = _contract(p, k, v, "tn")
    out = _contract(p, q, state, "nn")
    return (out * 0.3 if p.scale == "result" else out), state


def _contract(p: Program, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """a·b, a·bᵀ ("nt") or aᵀ·b ("tn") over the last two dims, spelled in one of several ways."""
    if p.spelling == "einsum":
        left, right = {"nn": ("ij", "jk"), "nt": ("ij", "kj"), "tn": ("ji", "jk")}[kind]
        return torch.einsum(f"...{left},...{right}->...ik", a, b)
    a = a.transpose(-1, -2) if kind == "tn" else a
    b = b.transpose(-1, -2) if kind == "nt" else b
    if p.spelling == "sum":
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    if p.spelling in ("bmm", "baddbmm"):
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
        b = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
        if p.spelling == "bmm":
            out = torch.bmm(a, b)
        else:
            zeros = torch.zeros(a.shape[0], a.shape[-2], b.shape[-1], dtype=a.dtype)
            out = torch.baddbmm(zeros, a, b, beta=0)
        return out.reshape(*batch, a.shape[-2], b.shape[-1])
    if p.spelling == "linear" and a.shape[:-2] == b.shape[:-2] and a.shape[:-2].numel() == 1:
        rows = F.linear(a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:]).T)
        return rows.reshape(*a.shape[:-1], b.shape[-1])
    return a @ b


def normalised(p: Program, out: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The numerator over its normaliser, and that."""
    if p.normaliser == "none":
        return out, None
    dtype = out.dtype
    if p.dtype == "norm upcast":
        q, k = q.float(), k.float()
    if p.normaliser == "padded":
        out, z = out[..., :-1], out[..., -1:]
    elif p.normaliser == "vector":
        z = q @ k.sum(-2).unsqueeze(-1)
    elif p.normaliser == "mean":
        z = q @ k.mean(dim=-2, keepdim=True).transpose(-1, -2)
    elif p.normaliser == "einsum":
        z = torch.einsum("...nc,...c->...n", q, k.sum(-2)).unsqueeze(-1)
    elif p.normaliser == "ones":
        z = q @ (k.transpose(-1, -2) @ torch.ones_like(k[..., :1]))
    elif p.normaliser == "product":
        z = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    else:
        z = (q @ k.transpose(-1, -2)).sum(-1, keepdim=True)
    return _divided(p, out, z, dtype), z


def _divided(p: Program, out: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    if p.guard == "add":
        z = z + p.eps
    elif p.guard == "clamp":
        z = z.clamp(min=p.eps)
    elif p.guard == "maximum":
        z = torch.maximum(z, torch.full_like(z, p.eps))
    if p.division == "reciprocal":
        return (out * (1 / z)).to(dtype)
    return out.div_(z) if p.division == "in place" else (out / z).to(dtype)


def miss(
    p: Program, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What resembles linear attention: its result, numerator, normaliser and state."""
    if p.near_miss == "swapped":
        out = q @ (k @ v.transpose(-1, -2))
        return *_pair(p, out, q, k), None
    if p.near_miss == "roles":  # N = M, and queries are summed over
        out = (q @ k.transpose(-1, -2)).transpose(-1, -2) @ v
        return *_pair(p, out, q, k), None
    if p.near_miss == "wrong normaliser":
        out = q @ (k.transpose(-1, -2) @ v)
        return _divided(p, out, k @ q.sum(-2).unsqueeze(-1), out.dtype), None, None, None
    if p.near_miss == "mutated between":
        memory = k.clone()
        out = q @ (memory.transpose(-1, -2) @ v)
        memory.mul_(2).add_(0.1)
        return *_pair(p, out, q, memory), None
    return _not_linear(p, q, k, v, given), None, None, None


def _pair(
    p: Program, out: Tensor, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if p.normaliser == "padded":
        return out, None, None
    out, z = normalised(p, out, q, k)
    return out, None, z


def _not_linear(p: Program, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> Tensor:
    if p.near_miss == "own key":
        return (q * k).sum(-1, keepdim=True) * v
    if p.near_miss == "prefix sum":
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(-3)
        return (q.unsqueeze(-2) @ states).squeeze(-2)
    if p.near_miss == "parameter":
        return q @ given.pop(0) @ (k.transpose(-1, -2) @ torch.ones_like(v))
    scores = q @ k.transpose(-1, -2)
    if p.near_miss == "softmax":
        scores = scores.softmax(-1)
    elif p.near_miss == "causal":
        scores = scores.tril()
    elif p.near_miss == "relu scores":
        scores = F.relu(scores - 0.5)
    elif p.near_miss == "bias":
        scores = scores + given.pop(0)
    elif p.near_miss == "distance":
        scores = scores * given.pop(0)
    return scores @ v
