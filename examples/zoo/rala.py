"""Rank-augmented linear attention (RALA).

Breaking the Low-Rank Dilemma of Linear Attention, Fan et al. 2024 (arXiv 2411.07635). Keys are
weighted by how much the mean query asks for them, which raises the rank of the state; the output
is modulated by a projection of the input, which raises the rank of the result:

    α_j = N · softmax_j(s · mean_i(φ(q_i)) · φ(k_j)),    κ_j = α_j φ(k_j),    φ = elu + 1
    y_i = R_i φ(q_i) · mean_j((R_j κ_j)ᵀ v_j)  ÷  (φ(q_i) · mean_j(κ_j) + eps)
    o_i = (y_i + LePE(v)_i) ⊙ (W_o x_i)

R is a rotary position over rows and columns, in the numerator alone; LePE a depthwise
convolution of v. Shapes: images x (B, C, H, W); C/heads a multiple of 4; N = H·W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["RankAugmentedLinearAttention"]


def rotate_half_pairs(x: Tensor) -> Tensor:
    """(x₀, x₁, x₂, x₃, …) → (−x₁, x₀, −x₃, x₂, …)"""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def theta_shift(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    return x * cos + rotate_half_pairs(x) * sin


class RankAugmentedLinearAttention(nn.Module):
    """dim: C; heads: of C/heads channels; kernel_size: of LePE; base: of the rotary frequencies."""

    def __init__(self, dim: int, heads: int, kernel_size: int = 5, base: float = 10000.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkvo = nn.Conv2d(dim, dim * 4, 1)
        self.lepe = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        quarter = dim // heads // 4
        frequencies = base ** (-torch.arange(quarter) / quarter)
        self.register_buffer("frequencies", frequencies.repeat_interleave(2), persistent=False)

    def positions(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """sin and cos of the angles of all pixels, (N, C/heads) each."""
        f = self.frequencies
        rows, columns = (torch.arange(n, device=f.device, dtype=f.dtype) for n in (h, w))
        rows = (rows[:, None] * f)[:, None].expand(h, w, -1)
        columns = (columns[:, None] * f)[None].expand(h, w, -1)
        angles = torch.cat((rows, columns), dim=-1).flatten(0, 1)
        return angles.sin(), angles.cos()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)"""
        h, w = x.shape[-2:]
        n = h * w
        sin, cos = self.positions(h, w)
        q, k, v, o = self.qkvo(x).chunk(4, dim=1)
        lepe = self.lepe(v)
        q, k, v = (rearrange(t, "b (m d) h w -> b m (h w) d", m=self.heads) for t in (q, k, v))
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0

        q_mean = q.mean(dim=-2, keepdim=True)
        alpha = torch.softmax(self.scale * q_mean @ k.transpose(-1, -2), dim=-1)  # [B, M, 1, N]
        k = k * alpha.transpose(-1, -2) * n
        q_rope, k_rope = theta_shift(q, sin, cos), theta_shift(k, sin, cos)

        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        kv = (k_rope.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        out = q_rope @ kv * z

        out = rearrange(out, "b m (h w) d -> b (m d) h w", h=h, w=w)
        return self.proj((out + lepe) * o)
