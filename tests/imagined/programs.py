"""What is compiled for the imagined GPU: attention with what is around it in models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROGRAMS", "Program"]


@dataclass(frozen=True)
class Program:
    """make: the function; shapes: of its inputs, which all ask for gradients; needless: part of a
    kernel's name that no generated code has.
    """

    make: Callable[[], Callable[..., Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    needless: str = ""


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D) of what φ has been applied to."""
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-2)


class Tokens(nn.Module):
    """x (B, N, C); three: q, k and v have projections of their own."""

    def __init__(self, dim: int, heads: int, three: bool = False) -> None:
        super().__init__()
        self.heads, self.norm, self.out = heads, nn.LayerNorm(dim), nn.Linear(dim, dim)
        widths = [dim] * 3 if three else [3 * dim]
        self.into = nn.ModuleList(nn.Linear(dim, width) for width in widths)

    def parts(self, x: Tensor) -> list[Tensor]:
        """q, k, v (B, H, N, D)."""
        made = [f(self.norm(x)) for f in self.into]
        made = made if len(made) == 3 else list(made[0].chunk(3, -1))
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in made]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(phi(q), phi(k), v)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(*self.parts(x)).transpose(1, 2).flatten(2))


class Rotated(Tokens):
    """Queries and keys are rotated after φ, and not in the normaliser."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = phi(q), phi(k)
        z = q @ k.mean(-2, keepdim=True).mT + 1e-6
        return _rotated(q) @ (_rotated(k).mT @ (v / k.shape[-2])) / z


def _rotated(x: Tensor) -> Tensor:
    n, d = x.shape[-2:]
    angle = torch.arange(n, device=x.device)[:, None] * 0.1 ** torch.arange(d // 2, device=x.device)
    (a, b), cos, sin = x.chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Weighted(Tokens):
    """With a weight for each key, and a convolution of the values beside (LePE)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.beside = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.parts(x)
        out = attention(phi(q), phi(k) * weight.sigmoid()[:, None, :, None], v)
        image = v.transpose(1, 2).flatten(2).mT.unflatten(2, (-1, 8))
        out = out.transpose(1, 2).flatten(2) + self.beside(image).flatten(2).mT
        return self.out(out)


class ConvolutionsAfter(Tokens):
    """A feed-forward of convolutions follows, as in SANA."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.up, self.down = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        image = self.up(x.mT.unflatten(2, (-1, 8)))
        return x + self.down(F.silu(self.depthwise(image))).flatten(2).mT


class Crossed(nn.Module):
    """Four heads of queries on x (B, N, C), `groups` of keys and values on y (B, M, C)."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.groups, self.q = groups, nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim // 2 * groups)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = phi(self.q(x)).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, self.groups, -1)).permute(2, 0, 3, 1, 4)
        if self.groups > 1:
            k, v = (t.repeat_interleave(4 // self.groups, 1) for t in (k, v))
        return attention(q, phi(k), v).transpose(1, 2).flatten(2)


class Between(nn.Module):
    """Attention between 1 × 1 convolutions, x (B, C, H, W), features before tokens."""

    def __init__(self, channels: int, heads: int, dim: int, normalised: bool) -> None:
        super().__init__()
        self.heads, self.normalised, self.norm = heads, normalised, nn.BatchNorm2d(channels)
        self.into = nn.Conv2d(channels, 3 * heads * dim, 1, bias=False)
        self.out = nn.Conv2d(heads * dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(self.norm(x)).chunk(3, 1)
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3) for t in parts)
        q, k = q.relu(), k.sigmoid()
        out = torch.einsum("bhde,bhdn->bhen", torch.einsum("bhdn,bhen->bhde", k, v), q)
        if self.normalised:
            out = out / (k.sum(-1).unsqueeze(-2) @ q + 1e-2)
        return x + self.out(out.reshape(x.shape[0], -1, *x.shape[2:]))


class Beside(nn.Module):
    """Between convolutions, with values that a depthwise convolution reads as well (LePE).

    joint: q, k and v are parts of one convolution's result, and the keys go through a softmax over
    the tokens; else each has a convolution, and the keys have φ.
    """

    def __init__(self, channels: int, heads: int, joint: bool) -> None:
        super().__init__()
        widths = [3 * channels] if joint else [channels] * 3
        self.heads, self.out = heads, nn.Conv2d(channels, channels, 1)
        self.into = nn.ModuleList(nn.Conv2d(channels, w, 1, bias=False) for w in widths)
        self.beside = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        made = [f(x) for f in self.into]
        parts = made[0].chunk(3, 1) if len(made) == 1 else made
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3) for t in parts)
        k = k.softmax(-1) if len(made) == 1 else phi(k)
        out = (k @ v.mT).mT @ phi(q)
        return self.out(out.reshape(x.shape) + self.beside(parts[2]))


def _of(kind: Any, *args: Any) -> Callable[[], Any]:
    return lambda: kind(*args)


_COPY = "poi_fused_convolution_backward"  # of the gradient, which the kernels should write there
_CLONE = "poi_fused_clone"  # of q, k or v, which are read where they are

PROGRAMS: dict[str, Program] = {
    "tokens": Program(_of(Tokens, 32, 2), ((2, 64, 32),)),
    "tokens, by passes": Program(_of(Tokens, 32, 2, True), ((1, 200, 32),)),
    "rotated": Program(_of(Rotated, 32, 2), ((2, 40, 32),)),
    "weighted": Program(_of(Weighted, 32, 2), ((2, 64, 32), (2, 64))),
    "convolutions after": Program(_of(ConvolutionsAfter, 96, 3), ((2, 64, 96),)),
    "crossed": Program(_of(Crossed, 64, 1), ((2, 40, 64), (2, 70, 64))),
    "crossed, in groups": Program(_of(Crossed, 64, 2), ((2, 40, 64), (2, 70, 64))),
    "between": Program(_of(Between, 32, 2, 16, False), ((2, 32, 8, 8),)),
    "between, channels last": Program(_of(Between, 96, 3, 32, True), ((2, 96, 8, 8),), _COPY),
    "softmax of the keys": Program(_of(Beside, 96, 3, True), ((2, 96, 8, 8),), _CLONE),
    "three convolutions": Program(_of(Beside, 96, 3, False), ((2, 96, 8, 8),), _CLONE),
}
