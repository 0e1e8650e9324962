"""Linear attention, with and without a normaliser, as functions of q, k, v.

Transformers are RNNs, Katharopoulos et al. 2020 (arXiv 2006.16236), equations 4 to 7:

    linear_attn   o_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j  ÷  (φ(q_i) · Σ_j φ(k_j) + eps),   φ(x) = elu(x) + 1
    simple_la     o_i = s · q_i Σ_j k_jᵀ v_j

Both sums run over the whole sequence: position i sees what comes after it.
Shapes: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), result (B, H, N, E).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["elu_plus_one", "linear_attn", "simple_la"]


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1: x + 1 above zero, exp(x) below."""
    return F.elu(x) + 1.0


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
    eps: float = 1e-6,
) -> Tensor:
    """Normalised linear attention. `feature_map` must not be negative, or z may be zero."""
    q, k = feature_map(q), feature_map(k)
    kv = k.transpose(-2, -1) @ v  # [B, H, D, E]
    z = 1.0 / (q @ k.sum(dim=-2).unsqueeze(-1) + eps)  # [B, H, N, 1]
    return (q @ kv) * z


def simple_la(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Linear attention without φ and without a normaliser; scale is D**-0.5 by default."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return (q * scale) @ (k.transpose(-2, -1) @ v)
