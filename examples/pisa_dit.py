"""Piecewise sparse attention in a diffusers transformer: what is replaced, what it changes.

    python examples/pisa_dit.py [--density 0.15] [--size 64]

A PixArt transformer (arXiv 2310.00426) with random weights denoises one latent image, exactly and
with `approximate`. The report says which attentions were replaced and why the others were not: the
cross-attention has a mask over the text. With random weights attention is nearly uniform, so the
difference printed says that the parts fit together, and nothing about a trained model. On a GPU the
two are timed.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from diffusers import PixArtTransformer2DModel

import bla_inductor


def make(size: int, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A transformer over size/2 × size/2 tokens, and its inputs."""
    large = device != "cpu"
    model = PixArtTransformer2DModel(
        num_attention_heads=16 if large else 2,
        attention_head_dim=72 if large else 16,
        num_layers=4 if large else 2,
        cross_attention_dim=1152 if large else 32,
        caption_channels=64,
        sample_size=size,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    dtype = torch.bfloat16 if large else torch.float32
    mask = torch.ones(1, 20)
    mask[:, 12:] = 0
    inputs = {
        "hidden_states": torch.randn(1, 4, size, size),
        "encoder_hidden_states": torch.randn(1, 20, 64),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": mask,
    }
    return (
        model.to(device, dtype).eval(),
        {name: x.to(device, dtype) for name, x in inputs.items()},
    )


def milliseconds(function, inputs: dict[str, torch.Tensor]) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: function(**inputs), warmup=50, rep=300, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--size", type=int, help="of the latent image; default 64, on a GPU 256")
    parser.add_argument("--inner", default="inductor", help="aot_eager needs no C++ compiler")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, inputs = make(given.size or (256 if device == "cuda" else 64), device)
    approximate = {"pisa": {"density": given.density, "block_size": given.block_size}}

    with torch.inference_mode():
        os.environ["BLA_APPROXIMATE"] = json.dumps(approximate)  # for `explain`
        print(bla_inductor.explain(model, **inputs))
        del os.environ["BLA_APPROXIMATE"]

        exact = torch.compile(model, backend="bla", options={"inner": given.inner})
        options = {"inner": given.inner, "approximate": approximate}
        sparse = torch.compile(model, backend="bla", options=options)
        expected, got = (f(**inputs).sample.float() for f in (exact, sparse))
        loss = (got - expected).norm() / expected.norm()
        print(f"\nrelative difference of the result: {loss.item():.4f}")
        if device == "cuda":
            before, after = (milliseconds(f, inputs) for f in (exact, sparse))
            print(f"exact {before:.2f} ms, approximate {after:.2f} ms: {before / after:.2f}×")


if __name__ == "__main__":
    main()
