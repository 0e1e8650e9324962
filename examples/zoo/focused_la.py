"""Focused linear attention of FLatten Transformer.

FLatten Transformer: Vision Transformer using Focused Linear Attention, Han et al. 2023
(arXiv 2308.00442). A feature map that sharpens the direction of a token and keeps its length, and
a convolution that gives back the rank which linear attention loses:

    f_p(x) = ‖x‖ / ‖x^p‖ · x^p   (power element by element),     φ_p(x) = f_p(ReLU(x))
    o_i = φ_p(q_i) · mean_j(φ_p(k_j)ᵀ v_j)  ÷  (φ_p(q_i) · mean_j(φ_p(k_j)) + eps)  +  DWC(v)_i

The norms are over all C channels, before the heads are split; q and k are divided by softplus of
a learned scale a channel; k carries a learned position.
Shapes: x (B, N, C), N = H·W pixels row by row. DWC is depthwise, the same for all heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FocusedLinearAttention", "focus"]


def focus(x: Tensor, power: float) -> Tensor:
    """f_p(x) = ‖x‖ / ‖x^p‖ · x^p over the last axis, for x > 0."""
    length = x.norm(dim=-1, keepdim=True)
    x = x**power
    return x / x.norm(dim=-1, keepdim=True) * length


class FocusedLinearAttention(nn.Module):
    """dim: C; size: (H, W); heads: of C/heads channels; power: p; kernel_size: of DWC."""

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        heads: int = 8,
        qkv_bias: bool = True,
        power: float = 3,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        self.size, self.heads, self.power = size, heads, power
        d = dim // heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, size[0] * size[1], dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) → (B, N, C)"""
        b, n, c = x.shape
        h, w = self.size
        q, k, v = self.qkv(x).reshape(b, n, 3, c).permute(2, 0, 1, 3).unbind(0)
        k = k + self.position
        scale = F.softplus(self.scale)
        q = focus((F.relu(q) + 1e-6) / scale, self.power)
        k = focus((F.relu(k) + 1e-6) / scale, self.power)
        q, k, v = (
            t.reshape(b, n, self.heads, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v)
        )  # [B·heads, N, D]

        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        kv = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        out = q @ kv * z

        image = v.transpose(1, 2).reshape(b * self.heads, -1, h, w)
        out = out + self.dwc(image).flatten(2).transpose(1, 2)
        out = out.unflatten(0, (b, self.heads)).transpose(1, 2).reshape(b, n, c)
        return self.proj(out)
