"""MLLA: a vision block with Mamba's macro design around linear attention.

Demystify Mamba in Vision: A Linear Attention Perspective, Han et al. 2024 (arXiv 2405.16605).
Rotary positions R go into the numerator alone; the normaliser keeps the features as they were:

    o_i = R_i φ(q_i) · mean_j((R_j φ(k_j))ᵀ v_j)  ÷  (φ(q_i) · mean_j(φ(k_j)) + eps)  +  LePE(v)_i

with φ = elu + 1. LePE is a depthwise 3 × 3 convolution of v over the image, and v is the input
itself. The block around it, with CPE a depthwise 3 × 3 convolution:

    y = x + CPE(x),   u = norm(y)
    y = y + W_out(attention(SiLU(DWConv(W_in u))) ⊙ SiLU(W_act u))
    y = y + CPE(y),   y = y + MLP(norm(y))

Shapes: images x (B, H, W, C); C a multiple of 4 and of the heads. N = H·W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LinearAttention", "MLLABlock", "Rotary2d"]


class Rotary2d(nn.Module):
    """Rotates pairs of channels: the first half by the row, the second half by the column."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(
                f"a two-dimensional rotation needs a multiple of 4 channels, not {dim}"
            )
        frequencies = base ** (-torch.arange(dim // 4) / (dim // 4))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C), rotated in the precision of the frequencies."""
        _, h, w, _ = x.shape
        rows, columns = (
            torch.arange(n, device=x.device, dtype=self.frequencies.dtype)[:, None]
            * self.frequencies
            for n in (h, w)
        )
        angles = torch.cat(
            (rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)), dim=-1
        )  # [H, W, C/2]
        cos, sin = angles.cos(), angles.sin()
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class LinearAttention(nn.Module):
    """Linear attention with RoPE and LePE. dim: C; heads: of C/heads channels each."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.rope = Rotary2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) → (B, H, W, C)"""
        b, h, w, c = x.shape
        n, heads, d = h * w, self.heads, c // self.heads
        q, k = self.qk(x).chunk(2, dim=-1)
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0

        q_rope = self.rope(q).reshape(b, n, heads, d).permute(0, 2, 1, 3)
        k_rope = self.rope(k).reshape(b, n, heads, d).permute(0, 2, 1, 3)
        q = q.reshape(b, n, heads, d).permute(0, 2, 1, 3)
        k = k.reshape(b, n, heads, d).permute(0, 2, 1, 3)
        v = x.reshape(b, n, heads, d).permute(0, 2, 1, 3)

        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        kv = (k_rope.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        out = q_rope @ kv * z

        out = out.transpose(1, 2).reshape(b, h, w, c)
        return out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MLLABlock(nn.Module):
    """One block of MLLA. dim: C; mlp_ratio: hidden channels of the MLP over C."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attention = LinearAttention(dim, heads, qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) → (B, H, W, C)"""
        x = x + channels_last(self.cpe1, x)
        shortcut = x
        x = self.norm1(x)
        gate = F.silu(self.act_proj(x))
        x = F.silu(channels_last(self.dwc, self.in_proj(x)))
        x = self.attention(x)
        x = shortcut + self.out_proj(x * gate)
        x = x + channels_last(self.cpe2, x)
        return x + self.mlp(self.norm2(x))


def channels_last(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
