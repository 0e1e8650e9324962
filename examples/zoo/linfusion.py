"""LinFusion: a diffusion UNet whose self-attention is generalised linear attention.

LinFusion: 1 GPU, 1 Minute, 16K Image, Liu et al. 2024 (arXiv 2409.02097). A Mamba made non-causal
and aware of its normaliser is, in the end, linear attention with refined queries and keys:

    q_i = φ(W_q (x_i + f_q(x_i))),   k_j = φ(W_k (x_j + f_k(x_j))),   v_j = W_v x_j,   φ = elu + 1
    o_i = q_i · mean_j(k_jᵀ v_j)  ÷  (q_i · mean_j(k_j) + eps)

The projections are those of the attention that is replaced; f_q and f_k are two-layer
perceptrons. Their last layer starts at zero: a pre-trained UNet is distilled from where it is.
Shapes: x (B, N, C), with N the pixels of a feature map; C/H = 40, 80, 160 in Stable Diffusion 1.5.

    unet = UNet2DConditionModel.from_pretrained(...)
    construct_for(unet)                      # or construct_for(pipeline)
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

__all__ = ["GeneralizedLinearAttention", "construct_for"]


class GeneralizedLinearAttention(nn.Module):
    """Takes the place of a self-attention of diffusers, and its projections with their weights.

    attention: the diffusers `Attention` to replace. eps: added to the normaliser.
    """

    def __init__(self, attention: Attention, eps: float = 1e-4) -> None:
        super().__init__()
        self.heads, self.eps = attention.heads, eps
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out
        weight = self.to_q.weight
        dim = weight.shape[1]
        self.refine_q = refinement(dim).to(weight.device, weight.dtype)
        self.refine_k = refinement(dim).to(weight.device, weight.dtype)
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states (B, N, C) → (B, N, C); the signature is that of diffusers' `Attention`."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("generalised linear attention is self-attention without a mask")
        q = self.to_q(hidden_states + self.refine_q(hidden_states))
        k = self.to_k(hidden_states + self.refine_k(hidden_states))
        v = self.to_v(hidden_states)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)

        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        n = k.shape[-2]
        z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + self.eps
        kv = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        out = self.merge_heads(q @ kv / z)

        for layer in self.to_out:  # the projection and the dropout
            out = layer(out)
        return out

    def split_heads(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        return x.reshape(b * self.heads, n, c // self.heads)

    def merge_heads(self, x: Tensor) -> Tensor:
        bh, n, d = x.shape
        x = x.reshape(bh // self.heads, self.heads, n, d).permute(0, 2, 1, 3)
        return x.reshape(bh // self.heads, n, self.heads * d)


def refinement(dim: int, reduction: int = 4) -> nn.Sequential:
    """f: C → C/4 → C, zero at first."""
    last = nn.Linear(dim // reduction, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(dim, dim // reduction), nn.LayerNorm(dim // reduction), nn.LeakyReLU(), last
    )


def construct_for(pipeline_or_unet: Any) -> dict[str, GeneralizedLinearAttention]:
    """Put generalised linear attention in place of every self-attention of a UNet.

    pipeline_or_unet: a UNet2DConditionModel, or anything that has one as `.unet`. It is changed in
    place; a second call changes nothing. Cross-attention stays.
    Returns all generalised linear attentions of the UNet by name.
    Raises TypeError for anything else, and ValueError where there is no self-attention to replace.
    """
    unet = getattr(pipeline_or_unet, "unet", pipeline_or_unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            "construct_for takes a diffusers UNet2DConditionModel or a pipeline with one as .unet, "
            f"not {type(pipeline_or_unet).__name__}"
        )
    for name, module in list(unet.named_modules()):
        attention = getattr(module, "attn1", None)
        # With only_cross_attention, attn1 reads the text as well.
        if isinstance(attention, Attention) and not attention.is_cross_attention:
            if not plain(attention):
                raise ValueError(
                    f"{name}.attn1 has norms or a residual of its own, which is not supported"
                )
            module.attn1 = GeneralizedLinearAttention(attention)
    mounted = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, GeneralizedLinearAttention)
    }
    if not mounted:
        raise ValueError("this UNet2DConditionModel has no self-attention (attn1)")
    return mounted


def plain(attention: Attention) -> bool:
    """Whether projections and softmax are all there is to it."""
    extras = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k)
    return all(extra is None for extra in extras) and not attention.residual_connection
