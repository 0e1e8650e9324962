"""Programs: linear attention assembled from choices, as many people would write it.

A `Program` is a record of choices; `build` makes the function and its inputs. The first value of
every choice is the plainest, so that hypothesis shrinks a failure to the choices that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["NEAR_MISSES", "Program", "build", "programs"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": lambda x: F.relu(x) + 1e-2,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "square": lambda x: x * x + 1e-2,
    "silu": lambda x: F.silu(x) + 0.5,
    "l1": lambda x: F.normalize(F.relu(x) + 0.1, p=1.0, dim=-1),
    "l2": lambda x: F.normalize(F.elu(x) + 1.1, dim=-1),
    "power": lambda x: (F.relu(x) + 0.1) ** 3,
    "clamp": lambda x: x.clamp(min=0.1),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "layout": ("bhnd", "bnhd", "merged", "packed", "image"),
    "q_map": tuple(FEATURE_MAPS),
    "k_map": ("same", *FEATURE_MAPS),
    "heads": ("all", "one k", "one k v"),
    "scale": ("none", "q", "k", "result", "inverse length"),
    "mask": ("none", "boolean", "weights", "fill"),
    "decoupled": (False, True),
    "order": ("state", "scores"),
    "spelling": ("matmul", "einsum", "bmm", "sum", "three"),
    "normaliser": ("none", "vector", "einsum", "ones", "rows", "mean"),
    "guard": ("add", "clamp", "none"),
    "division": ("div", "reciprocal", "in place"),
    "dtype": ("float32", "bfloat16", "upcast", "autocast"),
    "after": ("nothing", "merge heads", "residual", "gate", "gelu", "image"),
    "escape": ("nothing", "state", "features", "denominator"),
    "touch": ("nothing", "inputs before", "features after", "inputs after"),
    "unused_axis": (False, True),
}
NEAR_MISSES = ("softmax", "causal", "relu scores", "prefix sum", "bias", "parameter", "distance")


@dataclass(frozen=True)
class Program:
    """Choices by name, and the sizes."""

    layout: str
    q_map: str
    k_map: str
    heads: str
    scale: str
    mask: str
    decoupled: bool
    order: str
    spelling: str
    normaliser: str
    guard: str
    division: str
    dtype: str
    after: str
    escape: str
    touch: str
    unused_axis: bool
    B: int
    H: int
    N: int
    M: int
    D: int
    Dv: int
    near_miss: str = ""

    def __str__(self) -> str:
        """What is not the plainest choice."""
        told = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != CHOICES.get(f.name, (None,))[0]
        ]
        return ", ".join(told)


@st.composite
def programs(draw: st.DrawFn, near_miss: bool = False) -> Program:
    """Any program; with `near_miss`, one that resembles linear attention and is not."""
    chosen = {name: draw(st.sampled_from(values), label=name) for name, values in CHOICES.items()}
    sizes = {name: draw(st.integers(1, 3), label=name) for name in ("B", "H")}
    sizes |= {name: draw(st.sampled_from((4, 1, 2, 3, 7)), label=name) for name in ("D", "Dv")}
    n = draw(st.sampled_from((6, 1, 2, 4, 9)), label="N")
    m = draw(st.sampled_from((n, 1, 4, 8)), label="M")
    if chosen["layout"] in ("packed", "image"):  # one projection makes q, k and v
        m, sizes["Dv"], chosen["heads"] = n, sizes["D"], "all"
    if chosen["after"] == "residual":  # adds q to the result
        sizes["Dv"] = sizes["D"]
    if near_miss:
        chosen["order"], chosen["normaliser"] = "scores", "none"
        chosen["escape"] = chosen["touch"] = "nothing"
        n = m = max(n, 2)
    miss = draw(st.sampled_from(NEAR_MISSES), label="near miss") if near_miss else ""
    return Program(**chosen, **sizes, N=n, M=m, near_miss=miss)


def build(p: Program) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function (a tensor or a tuple of them) and its inputs."""
    dtype = torch.float32 if p.dtype in ("float32", "autocast") else torch.bfloat16
    k_heads = 1 if p.heads != "all" else p.H
    v_heads = 1 if p.heads == "one k v" else p.H
    sizes = ((p.H, p.N, p.D), (k_heads, p.M, p.D), (v_heads, p.M, p.Dv))
    inputs = [_stored(p, *size) for size in sizes]
    if p.layout == "packed":
        inputs = [torch.randn(p.B, p.N, 3 * p.H * p.D)]
    elif p.layout == "image":
        inputs = [torch.randn(p.B, 3 * p.H * p.D, 1, p.N)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    if p.mask == "weights":
        inputs.append((torch.rand(p.B, p.M) + 0.1).to(dtype).requires_grad_())
    elif p.mask != "none":
        inputs.append(torch.arange(p.B * p.M).reshape(p.B, p.M) % 3 != 1)
    if p.after == "gate":
        inputs.append(torch.randn(p.B, p.H, p.N, p.Dv).to(dtype).requires_grad_())
    if p.near_miss == "parameter":
        inputs.append(torch.nn.Parameter(torch.randn(p.H, p.D, p.D).to(dtype)))
    if p.near_miss in ("bias", "distance"):
        inputs.append(torch.randn(p.H, p.N, p.M).to(dtype).requires_grad_())

    def program(*given: Tensor) -> Any:
        if p.dtype == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return _run(p, list(given))
        return _run(p, list(given))

    return program, inputs


def _stored(p: Program, heads: int, rows: int, channels: int) -> Tensor:
    if p.layout == "bnhd":
        return torch.randn(p.B, rows, heads, channels)
    if p.layout == "merged":
        return torch.randn(p.B, rows, heads * channels)
    return torch.randn(p.B, heads, rows, channels)


def _heads(p: Program, x: Tensor, channels: int) -> Tensor:
    """An input as (B, H, rows, channels)."""
    if p.layout == "bnhd":
        return x.transpose(1, 2)
    if p.layout == "merged":
        return x.unflatten(-1, (-1, channels)).transpose(1, 2)
    return x


def _operands(p: Program, given: list[Tensor]) -> list[Tensor]:
    if p.layout == "packed":
        packed = given.pop(0).reshape(p.B, p.N, 3, p.H, p.D)
        return list(packed.permute(2, 0, 3, 1, 4).unbind(0))
    if p.layout == "image":
        parts = given.pop(0).flatten(2).chunk(3, dim=1)
        return [x.unflatten(1, (p.H, p.D)).transpose(-1, -2) for x in parts]
    stored = [given.pop(0) for _ in range(3)]
    return [_heads(p, x, c) for x, c in zip(stored, (p.D, p.D, p.Dv), strict=True)]


def _run(p: Program, given: list[Tensor]) -> Any:
    if p.touch == "inputs before":
        given[0] = given[0] * 1.5
        given[0].add_(0.25)
    q, k, v = _operands(p, given)
    raw, dtype = q, q.dtype
    if p.dtype == "upcast":
        q, k, v = q.float(), k.float(), v.float()
    q = FEATURE_MAPS[p.q_map](q)
    k = FEATURE_MAPS[p.q_map if p.k_map == "same" else p.k_map](k)
    if p.mask == "fill":
        k = k.masked_fill(~given.pop(0)[:, None, :, None], 0)
    elif p.mask != "none":
        k = k * given.pop(0)[:, None, :, None]
    if p.scale == "q":
        q = q * p.D**-0.5
    elif p.scale == "k":
        k = k / 3
    elif p.scale == "inverse length":
        k = k * k.shape[-2] ** -1.0
    q_norm, k_norm = q, k
    if p.decoupled:
        q, k = q + 0.5 * q.roll(1, -1), k + 0.5 * k.roll(1, -1)
    if p.unused_axis:
        q, k, v, q_norm, k_norm = (x.unsqueeze(1) for x in (q, k, v, q_norm, k_norm))
    out, state = _product(p, q, k, v, given)
    if p.unused_axis:
        out, q_norm, k_norm = out.squeeze(1), q_norm.squeeze(1), k_norm.squeeze(1)
    if p.scale == "result":
        out = out * 0.3
    out, denominator = _normalised(p, out, q_norm, k_norm, v)
    if p.dtype == "upcast":
        out = out.to(dtype)
    if p.touch == "features after":
        k.mul_(2)
    result = _after(p, out, raw, given)
    if p.touch == "inputs after" and p.layout == "bhnd":
        raw = raw * 1.0
        raw.add_(1)
    extra = {"state": state, "features": q_norm, "denominator": denominator}.get(p.escape)
    return result if extra is None else (result, extra)


def _product(
    p: Program, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """(q kᵀ) v or q (kᵀ v), and the state if there is one."""
    if p.near_miss:
        return _near_miss(p, q, k, v, given), None
    if p.spelling == "three" and q.dim() == 4:
        return torch.einsum("bhnc,bgmc,bjmd->bhnd", q, k, v) if p.heads != "all" else (
            torch.einsum("bhnc,bhmc,bhmd->bhnd", q, k, v)
        ), None
    if p.order == "scores":
        scores = _contract(p, q, k, "nt")
        return _contract(p, scores, v, "nn"), None
    state = _contract(p, k, v, "tn")
    return _contract(p, q, state, "nn"), state


def _contract(p: Program, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """a·b, a·bᵀ ("nt") or aᵀ·b ("tn") over the last two dims, spelled in one of several ways."""
    if p.spelling == "einsum":
        left, right = {"nn": ("ij", "jk"), "nt": ("ij", "kj"), "tn": ("ji", "jk")}[kind]
        return torch.einsum(f"...{left},...{right}->...ik", a, b)
    a = a.transpose(-1, -2) if kind == "tn" else a
    b = b.transpose(-1, -2) if kind == "nt" else b
    if p.spelling == "sum":
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    if p.spelling == "bmm":
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
        b = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
        return torch.bmm(a, b).reshape(*batch, a.shape[-2], b.shape[-1])
    return a @ b


def _near_miss(p: Program, q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> Tensor:
    if p.near_miss == "prefix sum":
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(-3)
        return (q.unsqueeze(-2) @ states).squeeze(-2)
    if p.near_miss == "parameter":
        return q @ given.pop() @ (k.transpose(-1, -2) @ torch.ones_like(v))
    scores = q @ k.transpose(-1, -2)
    if p.near_miss == "softmax":
        scores = scores.softmax(-1)
    elif p.near_miss == "causal":
        scores = scores.tril()
    elif p.near_miss == "relu scores":
        scores = F.relu(scores - 0.5)
    elif p.near_miss == "bias":
        scores = scores + given.pop()
    elif p.near_miss == "distance":
        scores = scores * given.pop()
    return scores @ v


def _normalised(
    p: Program, out: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    if p.normaliser == "none":
        return out, None
    if p.normaliser == "vector":
        z = q @ k.sum(-2).unsqueeze(-1)
    elif p.normaliser == "mean":
        z = q @ k.mean(dim=-2, keepdim=True).transpose(-1, -2)
    elif p.normaliser == "einsum":
        z = torch.einsum("bhnc,bgc->bhn" if p.heads != "all" else "bhnc,bhc->bhn", q, k.sum(2))
        z = z.unsqueeze(-1)
    elif p.normaliser == "ones":
        z = q @ (k.transpose(-1, -2) @ torch.ones_like(k[..., :1]))
    else:
        z = (q @ k.transpose(-1, -2)).sum(-1, keepdim=True)
    if p.guard == "add":
        z = z + 1e-4
    elif p.guard == "clamp":
        z = z.clamp(min=1e-2)
    if p.division == "div":
        return out / z, z
    if p.division == "reciprocal":
        return out * (1 / z), z
    if out.shape != torch.broadcast_shapes(out.shape, z.shape) or out.dtype != z.dtype:
        return out / z, z
    return out.div_(z), z


def _after(p: Program, out: Tensor, raw: Tensor, given: list[Tensor]) -> Tensor:
    if p.after == "merge heads":
        return out.transpose(1, 2).reshape(p.B, out.shape[2], -1)
    if p.after == "image":
        return out.transpose(-1, -2).reshape(p.B, -1, 1, out.shape[2])
    if p.after == "residual":
        return out + raw
    if p.after == "gate":
        return out * torch.sigmoid(given.pop(0))
    return F.gelu(out) if p.after == "gelu" else out
