"""The suite `models`: whole blocks and models, inference and training step, GPU time.

The blocks are those of examples/zoo at the sizes of their papers' first stages; SANA and
AutoencoderDC are diffusers', EfficientViT is timm's, LoFTR is kornia's. Times are CUDA-graph
replays of everything, parameters' gradients included, because small steps are bound by the host
otherwise.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache

from bla_inductor.bench import measure
from bla_inductor.bench.cases import Case
from bla_inductor.bench.output import Row
from bla_inductor.bench.providers import naive

__all__ = ["MODELS", "Model", "run"]

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_FACTOR, _ROUNDINGS = 1.1, 8.0
# A gradient of few numbers is luck in either direction, so by itself it has only to be right.
_RIGHT, _NEGLIGIBLE = 0.1, 1e-6
_WARM_UP = Case("warm-up", 1, 2, 256, 32)
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


def run(
    providers: Sequence[str], device: str, lengths: set[int], only: str, fresh: bool = False
) -> Iterator[Row]:
    """Rows for the models whose name contains `only` and whose N is in `lengths` (all if empty).

    fresh: every compilation starts with empty caches, and its time is told; it takes minutes.
    """
    if fresh:  # a process's first compilation pays for imports and starts the compile workers
        for name in ("inductor", "bla"):
            torch.compile(naive(_WARM_UP), backend=name)(*measure.make_inputs(_WARM_UP, device).qkv)
    for model in MODELS:
        if (lengths and model.N not in lengths) or only.lower() not in model.name.lower():
            continue
        yield from _model(
            model, [p for p in providers if p in ("torch", "inductor", "bla")], device, fresh
        )


def _model(model: Model, providers: Sequence[str], device: str, fresh: bool) -> Iterator[Row]:
    kind = str(model.dtype).removeprefix("torch.")
    blank = Row(model.name, f"N{model.N}", model.N, kind, "", "", "")
    torch.manual_seed(0)
    try:
        module, inputs, kwargs = model.make()
    except ModuleNotFoundError as missing:
        yield replace(blank, note=f"pip install {missing.name}: its package is not installed")
        return
    module = module.to(device, model.dtype)
    inputs = tuple(x.to(device, model.dtype) for x in inputs)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    start_state = copy.deepcopy(module.state_dict())  # a training step moves running statistics
    truth = _results(copy.deepcopy(module).double(), [x.double() for x in inputs], kwargs)
    references = [_results(module, inputs, kwargs)]
    inductor: dict[str, float] = {}
    for name in providers:
        torch._dynamo.reset()
        module.load_state_dict(start_state)
        ours = module if name == "torch" else torch.compile(module, backend=name, dynamic=False)
        with fresh_inductor_cache() if fresh and name != "torch" else nullcontext():
            start = time.perf_counter()
            results = _results(ours, inputs, kwargs)
            if device != "cpu":
                torch.cuda.synchronize()
            compiling = time.perf_counter() - start
        wrong = _worst(results, references, truth, model.dtype)
        row = replace(blank, provider=name, inaccuracy=wrong)
        if name == "inductor":
            references.append(results)
        elif not wrong <= 1:
            yield replace(row, run="training step", note=f"WRONG: {wrong:.2f}, not timed")
            continue
        for run_name, step in _steps(ours, module, inputs, kwargs).items():
            ms = measure.milliseconds(step, device)
            if name == "inductor":
                inductor[run_name] = ms
            made = replace(row, run=run_name, ms=ms)
            if run_name in inductor:
                made.inductor_ratio = inductor[run_name] / ms
            if fresh and name != "torch" and run_name == "training step":
                made.note = f"compiled in {compiling:.1f} s"
            yield made


def _steps(
    ours: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor], kwargs: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def inference() -> object:
        module.eval()
        with torch.no_grad():
            return ours(*inputs, **kwargs)

    with torch.no_grad():
        incoming = torch.randn_like(_tensor(module(*inputs, **kwargs)))

    def training() -> object:
        module.train()
        out = _tensor(ours(*inputs, **kwargs))
        return torch.autograd.grad(out, parameters, incoming, allow_unused=True)

    return {"inference": inference, "training step": training}


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[-1]


def _results(
    function: Callable[..., Any], inputs: Sequence[Tensor], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The output in inference, in training, the gradients of all parameters as one vector, and each
    by itself.
    """
    module: Any = getattr(function, "_orig_mod", function)
    module.eval()
    with torch.no_grad():
        inferred = _tensor(function(*inputs, **kwargs))
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    out = _tensor(function(*inputs, **kwargs))
    generator = torch.Generator(out.device).manual_seed(1)
    incoming = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, parameters, incoming, allow_unused=True)
    given = [g.flatten() for g in grads if g is not None]
    return [inferred, out.detach(), torch.cat(given), *given]


def _worst(
    ours: Sequence[Tensor],
    references: Sequence[Sequence[Tensor]],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> float:
    """The largest error over what is allowed: that of eager mode, or of Inductor where it has been
    measured, times 1.1, at least a few roundings.
    """
    floor = _ROUNDINGS * torch.finfo(dtype).eps
    least = _NEGLIGIBLE * truth[2].norm().item()  # gradients that are zero but for rounding

    def ratio(i: int, floor: float, factor: float) -> float:
        errors = (measure.error(r[i], truth[i]) for r in references)
        return measure.error(ours[i], truth[i]) / max(floor, *(factor * e for e in errors))

    whole = [ratio(i, floor, _FACTOR) for i in range(3)]
    each = [i for i in range(3, len(truth)) if truth[i].norm() > least]
    return max(whole + [ratio(i, _RIGHT, 1 / _RIGHT) for i in each])
