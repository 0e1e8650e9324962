"""Non-causal state space duality of VSSD.

VSSD: Vision Mamba with Non-Causal State Space Duality, Shi et al. 2024 (arXiv 2407.18559). In the
dual form of Mamba-2 the scalar A decays what came before; without a direction a token keeps only
its own weight, in one state which all tokens read. That is linear attention without a normaliser:

    h = Σ_j Δ_j |A| · B_jᵀ x_j,    y_i = C_i h + D ⊙ x_i,    Δ = softplus(W_Δ u + b),   A = −exp(a)

C are the queries and B the keys, of one head for all heads of x; Δ and A are one scalar a head.
Around it a convolution of (x, B, C) over the image, a norm, and a gate: W(norm(y) ⊙ SiLU(W_z u)).
Shapes: images u (B, H, W, C) with L = H·W tokens; x (B, heads, L, P), B and C (B, 1, L, S).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NonCausalSSD", "non_causal_ssd"]


def non_causal_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """y of x (B, L, heads, P), dt (B, L, heads), A and D (heads), B and C (B, L, S)."""
    b, length, heads, _ = x.shape
    v = x.permute(0, 2, 1, 3)  # [B, heads, L, P]
    weight = -(dt * A).permute(0, 2, 1).view(b, heads, length, 1)
    k = B.view(b, 1, length, -1)
    q = C.view(b, 1, length, -1)
    kv = k.transpose(-2, -1) @ (v * weight)  # [B, heads, S, P]
    y = q @ kv
    if D is not None:
        y = y + v * D.view(1, heads, 1, 1)
    return y.permute(0, 2, 1, 3)


class NonCausalSSD(nn.Module):
    """The token mixer. dim: C; state: S; head_dim: P; expand: channels of x over C."""

    def __init__(
        self,
        dim: int,
        state: int = 64,
        head_dim: int = 64,
        expand: float = 2,
        kernel_size: int = 3,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        self.state, self.head_dim = state, head_dim
        self.inner = int(expand * dim)
        self.heads = self.inner // head_dim
        mixed = self.inner + 2 * state
        self.in_proj = nn.Linear(dim, self.inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv2d(mixed, mixed, kernel_size, padding=kernel_size // 2, groups=mixed)
        dt = torch.logspace(0, 1, self.heads, base=dt_max / dt_min) * dt_min
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.heads).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.LayerNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """u (B, H, W, C) → (B, H, W, C)"""
        b, h, w, _ = u.shape
        z, xBC, dt = self.in_proj(u).split(
            [self.inner, self.inner + 2 * self.state, self.heads], dim=-1
        )
        dt = F.softplus(dt + self.dt_bias).view(b, h * w, self.heads)
        A = -torch.exp(self.A_log)
        xBC = F.silu(self.conv(xBC.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)  # [B, L, …]
        x, B, C = xBC.split([self.inner, self.state, self.state], dim=-1)

        y = non_causal_ssd(x.unflatten(-1, (self.heads, self.head_dim)), dt, A, B, C, self.D)
        y = self.norm(y.reshape(b, h, w, self.inner))
        return self.out_proj(y * F.silu(z))
