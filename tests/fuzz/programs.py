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

from tests.fuzz.products import miss, normalised, product

__all__ = ["NEAR_MISSES", "SUSPECTS", "Program", "build", "programs"]

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
    "softplus": F.softplus,
    "where": lambda x: torch.where(x > 0, x + 0.2, 0.2 / (1 - x)),
    "largest": lambda x: (x - x.amax(-1, keepdim=True)).exp(),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "layout": ("bhnd", "bnhd", "merged", "packed", "image"),
    "inferred": (False, True),  # the number of heads, -1 where they are split
    "q_map": tuple(FEATURE_MAPS),
    "k_map": ("same", *FEATURE_MAPS),
    "heads": ("all", "one k", "one k v", "repeated"),
    "batch": ("all", "one q", "one k v"),
    "scale": ("none", "q", "k", "result", "inverse length", "per head"),
    "mask": ("none", "boolean", "weights", "fill", "where", "queries"),
    "decoupled": (False, True),
    "order": ("state", "scores"),
    "spelling": ("matmul", "einsum", "bmm", "sum", "three", "baddbmm", "linear"),
    "normaliser": ("none", "vector", "einsum", "ones", "rows", "mean", "padded", "product"),
    "guard": ("add", "clamp", "maximum", "none"),
    "eps": (1e-2, 1e-15, 1.0),
    "division": ("div", "reciprocal", "in place"),
    "dtype": ("float32", "bfloat16", "float16", "upcast", "norm upcast", "autocast", "float64"),
    "after": ("nothing", "merge heads", "residual", "gate", "gelu", "image", "slice"),
    "escape": ("nothing", "state", "features", "denominator", "numerator"),
    "touch": ("nothing", "inputs before", "features after", "inputs after", "result after"),
    "axes": ("all", "unused", "folded"),
    "frozen": ("nothing", "q", "k v", "everything"),
    "dynamic": ("no", "no", "no", "sizes", "numbers too"),
}
# Not linear attention: no match, and a reason.
NEAR_MISSES = (
    "softmax", "causal", "relu scores", "prefix sum", "bias", "parameter", "distance", "own key",
)  # fmt: skip
# As easily taken for another linear attention than it is.
SUSPECTS = ("swapped", "roles", "wrong normaliser", "mutated between")
LOW = {
    "float32": torch.float32,
    "float64": torch.float64,
    "autocast": torch.float32,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Program:
    """Choices by name, and the sizes."""

    layout: str
    inferred: bool
    q_map: str
    k_map: str
    heads: str
    batch: str
    scale: str
    mask: str
    decoupled: bool
    order: str
    spelling: str
    normaliser: str
    guard: str
    eps: float
    division: str
    dtype: str
    after: str
    escape: str
    touch: str
    axes: str
    frozen: str
    dynamic: str
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

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the inputs."""
        return LOW.get(self.dtype, torch.bfloat16)


@st.composite
def programs(draw: st.DrawFn, kinds: tuple[str, ...] = ()) -> Program:
    """Any program; with `kinds`, one that resembles linear attention and is one of these."""
    chosen = {name: draw(st.sampled_from(values), label=name) for name, values in CHOICES.items()}
    sizes = {name: draw(st.integers(1, 3), label=name) for name in ("B", "H")}
    sizes |= {name: draw(st.sampled_from((4, 1, 2, 3, 7)), label=name) for name in ("D", "Dv")}
    n = draw(st.sampled_from((6, 1, 2, 4, 9)), label="N")
    m = draw(st.sampled_from((n, 1, 4, 8)), label="M")
    near_miss = draw(st.sampled_from(kinds), label="near miss") if kinds else ""
    if near_miss:
        chosen["order"], chosen["axes"] = "scores", "all"
        chosen["escape"] = chosen["touch"] = "nothing"
        chosen["heads"] = chosen["batch"] = "all"
        n = m = max(n, 2)
    if near_miss in NEAR_MISSES:
        chosen["normaliser"] = "none"
    if near_miss == "swapped":  # the sizes do not tell the axes apart
        sizes["D"] = sizes["Dv"] = n
    if near_miss == "mutated between":
        chosen["order"] = "state"
    if chosen["layout"] in ("packed", "image"):  # one projection makes q, k and v
        m, sizes["Dv"], chosen["heads"], chosen["batch"] = n, sizes["D"], "all", "all"
        chosen["frozen"] = "nothing"
    if chosen["heads"] == "repeated":
        sizes["H"] = 2 * sizes["H"]
        if chosen["dynamic"] != "no":  # one symbolic quotient is not known as twice the other
            chosen["inferred"] = False
    if chosen["after"] == "residual":  # adds q to the result
        sizes["Dv"] = sizes["D"]
    return Program(**chosen, **sizes, N=n, M=m, near_miss=near_miss)


def build(p: Program) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function (a tensor or a tuple of them) and its inputs."""
    k_heads, v_heads = _key_heads(p)
    q_batch = 1 if p.batch == "one q" else p.B
    k_batch = 1 if p.batch == "one k v" else p.B
    if p.layout == "packed":
        inputs = [torch.randn(p.B, p.N, 3 * p.H * p.D)]
    elif p.layout == "image":
        inputs = [torch.randn(p.B, 3 * p.H * p.D, 1, p.N)]
    else:
        inputs = [
            _stored(p, q_batch, p.H, p.N, p.D),
            _stored(p, k_batch, k_heads, p.M, p.D),
            _stored(p, k_batch, v_heads, p.M, p.Dv),
        ]
    wanted = {"q": (False, True, True), "k v": (True, False, False)}.get(p.frozen, (True,) * 3)
    inputs = [x.to(p.stored).requires_grad_(need) for x, need in zip(inputs, wanted, strict=False)]
    if p.mask in ("boolean", "fill", "where"):
        inputs.append(torch.arange(k_batch * p.M).reshape(k_batch, p.M) % 3 != 1)
    elif p.mask == "queries":
        inputs.append(torch.arange(q_batch * p.N).reshape(q_batch, p.N) % 3 != 1)
    elif p.mask == "weights":
        inputs.append((torch.rand(k_batch, p.M) + 0.1).to(p.stored).requires_grad_())
    if p.scale == "per head":
        inputs.append(torch.nn.Parameter((torch.rand(p.H, 1, 1) + 0.5).to(p.stored)))
    if p.near_miss == "parameter":
        inputs.append(torch.nn.Parameter(torch.randn(p.H, p.D, p.D).to(p.stored)))
    if p.near_miss in ("bias", "distance"):
        inputs.append(torch.randn(p.H, p.N, p.M).to(p.stored).requires_grad_())
    if p.after == "gate":
        inputs.append(torch.randn(p.B, p.H, p.N, p.Dv).to(p.stored).requires_grad_())
    if p.frozen == "everything":
        inputs = [x.detach() for x in inputs]

    if p.dynamic == "numbers too":  # those of a module are static
        return (lambda *given: _under(p, list(given))), inputs
    return _Model(p), inputs


class _Model(torch.nn.Module):
    """The choices as attributes of a module, as head dims and eps usually are."""

    def __init__(self, p: Program) -> None:
        super().__init__()
        for field in fields(p):
            setattr(self, field.name, getattr(p, field.name))

    def forward(self, *given: Tensor) -> Any:
        return _under(self, list(given))


def _under(p: Any, given: list[Tensor]) -> Any:
    if p.dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            return _run(p, given)
    return _run(p, given)


def _key_heads(p: Program) -> tuple[int, int]:
    """How many heads k and v have."""
    k_heads = {"all": p.H, "repeated": p.H // 2}.get(p.heads, 1)
    return k_heads, {"one k v": 1, "repeated": p.H // 2}.get(p.heads, p.H)


def _stored(p: Program, batch: int, heads: int, rows: int, channels: int) -> Tensor:
    if p.layout == "bnhd":
        return torch.randn(batch, rows, heads, channels)
    if p.layout == "merged":
        return torch.randn(batch, rows, heads * channels)
    return torch.randn(batch, heads, rows, channels)


def _heads(p: Program, x: Tensor, heads: int, channels: int) -> Tensor:
    """An input as (B, heads, rows, channels)."""
    if p.layout == "bnhd":
        return x.transpose(1, 2)
    if p.layout == "merged":
        return x.unflatten(-1, (-1 if p.inferred else heads, channels)).transpose(1, 2)
    return x


def _operands(p: Program, given: list[Tensor]) -> list[Tensor]:
    count = -1 if p.inferred else p.H
    if p.layout == "packed":
        x = given.pop(0)
        packed = x.reshape(x.shape[0], x.shape[1], 3, count, p.D)
        return list(packed.permute(2, 0, 3, 1, 4).unbind(0))
    if p.layout == "image":
        parts = given.pop(0).flatten(2).chunk(3, dim=1)
        return [x.unflatten(1, (count, p.D)).transpose(-1, -2) for x in parts]
    k_heads, v_heads = _key_heads(p)
    sizes = (p.H, p.D), (k_heads, p.D), (v_heads, p.Dv)
    return [_heads(p, given.pop(0), heads, channels) for heads, channels in sizes]


def _masked(p: Program, q: Tensor, k: Tensor, given: list[Tensor]) -> tuple[Tensor, Tensor]:
    if p.mask == "none":
        return q, k
    mask = given.pop(0)[:, None, :, None]
    if p.mask == "queries":
        return q * mask, k
    if p.mask == "fill":
        return q, k.masked_fill(~mask, 0)
    return q, torch.where(mask, k, 0.0) if p.mask == "where" else k * mask


def _scaled(p: Program, q: Tensor, k: Tensor, given: list[Tensor]) -> tuple[Tensor, Tensor]:
    if p.scale == "q":
        return q * p.D**-0.5, k
    if p.scale == "k":
        return q, k / 3
    if p.scale == "inverse length":
        return q, k * k.shape[-2] ** -1.0
    return (q * given.pop(0), k) if p.scale == "per head" else (q, k)


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
    q, k = _masked(p, q, k, given)
    q, k = _scaled(p, q, k, given)
    if p.heads == "repeated":
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q_norm, k_norm = q, k
    if p.decoupled:
        q, k = q + 0.5 * q.roll(1, -1), k + 0.5 * k.roll(1, -1)
    if p.axes == "unused":
        q, k, v, q_norm, k_norm = (x.unsqueeze(1) for x in (q, k, v, q_norm, k_norm))
    one_batch = p.batch == "all" or p.B == 1
    fold = p.axes == "folded" and one_batch and (p.heads in ("all", "repeated") or p.H == 1)
    if fold:
        q, k, v, q_norm, k_norm = (x.flatten(0, 1) for x in (q, k, v, q_norm, k_norm))
    if p.near_miss:
        out, numerator, z, state = miss(p, q, k, v, given)
    else:
        if p.normaliser == "padded":
            v = F.pad(v, (0, 1), value=1.0)
        numerator, state = product(p, q, k, v)
        if p.axes == "unused":
            numerator, q_norm, k_norm = (x.squeeze(1) for x in (numerator, q_norm, k_norm))
        out, z = normalised(p, numerator, q_norm, k_norm)
    if fold:
        out = out.unflatten(0, (p.B, p.H))
    if p.dtype == "upcast":
        out = out.to(dtype)
    if p.touch == "features after":
        k.mul_(2)
    result = _after(p, out, raw, given)
    if p.touch == "inputs after" and p.layout == "bhnd":
        raw = raw * 1.0
        raw.add_(1)
    if p.touch == "result after":
        result.mul_(0.5)
    escaping = {"state": state, "features": q_norm, "denominator": z, "numerator": numerator}
    extra = escaping.get(p.escape)
    if p.division == "in place" and p.escape == "numerator":
        extra = None  # it is the result
    return result if extra is None else (result, extra)


def _after(p: Program, out: Tensor, raw: Tensor, given: list[Tensor]) -> Tensor:
    if p.after == "merge heads":
        return out.transpose(1, 2).reshape(p.B, p.N, -1)
    if p.after == "image":
        return out.transpose(-1, -2).reshape(p.B, -1, 1, p.N)
    if p.after == "residual":
        return out + raw
    if p.after == "gate":
        return out * torch.sigmoid(given.pop(0))
    if p.after == "slice":
        return out[:, :, : p.N // 2 + 1]
    return F.gelu(out) if p.after == "gelu" else out
