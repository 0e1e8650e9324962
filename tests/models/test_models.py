"""Real models, from the packages that ship them: how many attentions are found, and that nothing
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.numerics import assert_no_less_accurate

diffusers = pytest.importorskip("diffusers")


@dataclass(frozen=True)
class Model:
    """name, how it is made, the inputs of `forward` that carry gradients, the other ones, expected
    matches.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[list[Tensor], dict[str, Any]]]
    matches: int


def sana(**kwargs: Any) -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=8,
        **kwargs,
    )


def sana_inputs() -> tuple[list[Tensor], dict[str, Any]]:
    tensors = [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)]
    return tensors, {"timestep": torch.tensor([1, 7]), "return_dict": False}


def autoencoder_dc() -> nn.Module:
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def images(size: int) -> Callable[[], tuple[list[Tensor], dict[str, Any]]]:
    return lambda: ([torch.randn(2, 3, size, size)], {"return_dict": False})


MODELS = [
    Model("SanaTransformer2DModel", sana, sana_inputs, 2),
    Model(
        "SanaTransformer2DModel, qk_norm",
        lambda: sana(qk_norm="rms_norm_across_heads"),
        sana_inputs,
        2,
    ),
    Model("AutoencoderDC, linear branch", autoencoder_dc, images(16), 2),
    Model("AutoencoderDC, quadratic branch", autoencoder_dc, images(4), 2),
    Model(
        "BasicTransformerBlock, softmax",
        lambda: diffusers.models.attention.BasicTransformerBlock(32, 2, 16),
        lambda: ([torch.randn(2, 16, 32)], {}),
        0,
    ),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_model(model: Model) -> None:
    module = model.make()
    tensors, others = model.inputs()
    tensors = [t.requires_grad_() for t in tensors]

    def forward(run: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(first: Tensor, *rest: Tensor) -> Tensor:
            # The fp64 reference runs the same module in fp64.
            module.to(first.dtype)
            result = run(first, *rest, **others)
            return result[0] if isinstance(result, tuple) else result

        return call

    run = torch.compile(module, backend="bla", options={"inner": "aot_eager"}, fullgraph=True)
    counters.clear()
    assert_no_less_accurate(forward(run), forward(module), tensors, roundings=8.0)
    assert counters["bla"]["matched"] == model.matches
