"""Polarity-aware linear attention of PolaFormer.

PolaFormer: Polarity-aware Linear Attention for Vision Transformers, Meng et al. 2025
(arXiv 2501.15061). Query and key are split by sign, x⁺ = ReLU(x), x⁻ = ReLU(−x), and raised to a
learned power p > 1 a channel. Half of the value channels see pairs of the same sign, the other
half pairs of opposite sign:

    q^s = [q⁺ q⁻],   q^o = [q⁻ q⁺],   k = [k⁺ k⁻],   p = 1 + α · sigmoid(w)
    o^s_i = q^s_i · mean_j(k_jᵀ v^s_j)  ÷  (q^s_i · mean_j(k_j) + eps),     o^o with q^o and v^o
    o = ([o^s o^o] + DWC(v)) ⊙ G

G, the polarity coefficients, are projected from the input. The two attentions share their keys.
Shapes: x (B, N, C), N = H·W pixels row by row; features 2·C/heads, values C/heads/2 a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PolaLinearAttention"]


class PolaLinearAttention(nn.Module):
    """dim: C; size: (H, W); heads: of C/heads channels; alpha: the largest power is 1 + alpha."""

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        heads: int = 8,
        qkv_bias: bool = True,
        alpha: float = 4.0,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        self.size, self.heads, self.alpha = size, heads, alpha
        d = dim // heads
        self.qg = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)
        self.power = nn.Parameter(torch.zeros(1, heads, 1, d))
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, size[0] * size[1], dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) → (B, N, C)"""
        b, n, c = x.shape
        h, w = self.size
        q, g = self.qg(x).chunk(2, dim=-1)
        k, v = self.kv(x).chunk(2, dim=-1)
        k = k + self.position
        scale = F.softplus(self.scale)
        q, k = q / scale, k / scale
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))

        power = 1 + self.alpha * torch.sigmoid(self.power)
        q_pos, q_neg = F.relu(q) ** power, F.relu(-q) ** power
        k_pos, k_neg = F.relu(k) ** power, F.relu(-k) ** power
        q_same = torch.cat((q_pos, q_neg), dim=-1)
        q_opposite = torch.cat((q_neg, q_pos), dim=-1)
        k = torch.cat((k_pos, k_neg), dim=-1)
        v_same, v_opposite = v.chunk(2, dim=-1)

        k_mean = k.mean(dim=-2, keepdim=True).transpose(-2, -1)
        z = 1 / (q_same @ k_mean + 1e-6)
        kv = (k.transpose(-2, -1) * n**-0.5) @ (v_same * n**-0.5)
        same = q_same @ kv * z
        z = 1 / (q_opposite @ k_mean + 1e-6)
        kv = (k.transpose(-2, -1) * n**-0.5) @ (v_opposite * n**-0.5)
        opposite = q_opposite @ kv * z

        out = torch.cat((same, opposite), dim=-1).transpose(1, 2).reshape(b, n, c)
        image = v.transpose(-2, -1).reshape(b * self.heads, -1, h, w)
        out = out + self.dwc(image).reshape(b, c, n).transpose(1, 2)
        return self.proj(out * g)
