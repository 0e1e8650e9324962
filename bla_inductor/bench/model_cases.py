"""The models of the suite `models`.

The blocks are those of examples/zoo at the sizes of their papers' first stages; SANA and
AutoencoderDC are diffusers', EfficientViT and CoaT are timm's, LoFTR is kornia's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "AttentionBlock", "Made", "Model"]

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Made = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """make: the module, its inputs and keyword arguments; N: tokens that the attention sees."""

    name: str
    N: int
    make: Callable[[], Made]
    dtype: torch.dtype = torch.bfloat16
    training: bool = True


def _zoo(module: str, name: str, *args: Any, shape: tuple[int, ...], **kwargs: Any) -> Any:
    def make() -> Made:
        if str(_EXAMPLES) not in sys.path:
            sys.path.insert(0, str(_EXAMPLES))
        kind = getattr(importlib.import_module(f"zoo.{module}"), name)
        return kind(*args, **kwargs), (torch.randn(shape),), {}

    return make


def _sana(side: int) -> Callable[[], Made]:
    def make() -> Made:
        from diffusers import SanaTransformer2DModel

        model: Any = SanaTransformer2DModel(num_layers=2, sample_size=side)
        x, caption = torch.randn(1, 32, side, side), torch.randn(1, 300, 2304)
        timestep = torch.tensor([500.0])
        return model, (x, caption), {"timestep": timestep, "return_dict": False}

    return make


def _dc(side: int) -> Callable[[], Made]:
    def make() -> Made:
        from diffusers import AutoencoderDC

        widths = (128, 256, 512)
        blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
        model: Any = AutoencoderDC(
            in_channels=3,
            latent_channels=32,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_layers_per_block=(1, 1, 3),
            decoder_layers_per_block=(1, 1, 3),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        )
        return model, (torch.randn(1, 3, side, side),), {"return_dict": False}

    return make


def _efficientvit(side: int) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        model: Any = timm.create_model("efficientvit_b1", features_only=True)
        return model, (torch.randn(8, 3, side, side),), {}

    return make


def _coat() -> Made:
    import timm

    model: Any = timm.create_model("coat_lite_small", drop_path_rate=0.0)
    return model, (torch.randn(16, 3, 224, 224),), {}


def _loftr(width: int, pairs: int, batch: int, tokens: int) -> Callable[[], Made]:
    """LoFTR's layers over two images: of coarse features, or of a window around each match."""

    def make() -> Made:
        transformer: Any = importlib.import_module("kornia.feature.loftr.loftr_module.transformer")
        config = {"d_model": width, "nhead": 4, "layer_names": ["self", "cross"] * pairs}
        model: Any = transformer.LocalFeatureTransformer({**config, "attention": "linear"})
        return model, tuple(torch.randn(batch, tokens, width) for _ in range(2)), {}

    return make


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(norm(x)))) with φ = elu + 1: a block like MLLA's without convolutions
    and gates. x (B, N, C).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = q @ k.mean(-2, keepdim=True).mT + 1e-6
        out = q @ (k.mT @ (v / k.shape[-2])) / z
        return x + self.proj(out.transpose(1, 2).flatten(2))


class ImageAttention(nn.Module):
    """Linear attention of a diffusion U-Net: softmax of q over its features and of k over all
    pixels, between 1 × 1 convolutions. x (B, C, H, W). Paper: "Efficient Attention: Attention with
    Linear Complexities" (2021, arXiv 1812.01243).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, 1)
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3) for t in parts)
        q, k = q.softmax(2) * q.shape[2] ** -0.5, k.softmax(3)
        state = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", state, q)
        return self.out(out.reshape(x.shape))


def _image(heads: int) -> Callable[[], Made]:
    return lambda: (ImageAttention(256, heads), (torch.randn(8, 256, 64, 64),), {})


def _block() -> Made:
    return AttentionBlock(64, 2), (torch.randn(64, 3136, 64),), {}


MODELS = [
    Model("SANA", 1024, _sana(32)),
    Model("SANA", 4096, _sana(64)),
    Model("SANA", 16384, _sana(128)),
    Model("AutoencoderDC", 4096, _dc(256)),
    Model("EfficientViT-B1 backbone", 1024, _efficientvit(512)),
    Model("CoaT-Lite Small", 3137, _coat),
    Model("MLLA-like block", 3136, _block),
    Model("MLLA block", 3136, _zoo("mlla", "MLLABlock", 64, 2, shape=(64, 56, 56, 64))),
    Model(
        "FLatten attention",
        3136,
        _zoo("focused_la", "FocusedLinearAttention", 64, (56, 56), 2, shape=(64, 3136, 64)),
    ),
    Model(
        "PolaFormer attention",
        3136,
        _zoo("polaformer", "PolaLinearAttention", 64, (56, 56), 2, shape=(64, 3136, 64)),
    ),
    Model(
        "RALA attention",
        3136,
        _zoo("rala", "RankAugmentedLinearAttention", 64, 2, shape=(64, 64, 56, 56)),
    ),
    Model("diffusion U-Net attention", 4096, _image(8)),
    Model("diffusion U-Net attention, fp32", 4096, _image(8), torch.float32),
    Model("LoFTR, 640 × 480", 4800, _loftr(256, 4, 1, 4800)),
    Model("LoFTR, 640 × 480, fp32", 4800, _loftr(256, 4, 1, 4800), torch.float32),
    Model("LoFTR, windows", 25, _loftr(128, 1, 2000, 25)),
    Model("VSSD mixer", 3136, _zoo("vssd", "NonCausalSSD", 64, shape=(64, 56, 56, 64))),
]
