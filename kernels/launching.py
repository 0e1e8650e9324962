"""How every kernel is launched, and what optional arguments look like."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from bla_inductor.kernels import heuristics
from bla_inductor.kernels.heuristics import Tile
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """The normaliser of a call."""

    normalizer: str
    scale: float
    norm_scale: float
    eps: float

    @property
    def values(self) -> tuple[float, float, float]:
        return self.scale, self.norm_scale, self.eps

    @property
    def normalized(self) -> bool:
        return self.normalizer != "none"


@dataclass(frozen=True)
class Map:
    """A feature map as kernels take it: functions, or None for the identity."""

    text: str = ""
    forward: Any = None
    gradient: Any = None


def feature_map(text: str, dtype: torch.dtype) -> Map:
    """The compiled feature map of a text, for tensors of `dtype`; "" is the identity.

    Rows beyond the last are 0 when they meet the map, and multiplied by 0 afterwards: a map that is
    not finite at 0 takes 1 for it. Where that is a number of the user's, so is what comes of it.
    """
    if not text:
        return Map()
    from bla_inductor.kernels.feature_map import compiled

    usable = text if _finite_at_zero(text) else f"{_ONE_FOR_ZERO} -> {text}"
    functions = compiled(usable, fast=dtype != torch.float32)
    return Map(text, functions.forward, functions.backward)


_ONE_FOR_ZERO = "Piecewise((x, x > 0), (x, x < 0), (1, x >= 0), (x, True))"


@cache
def _finite_at_zero(text: str) -> bool:
    from bla_inductor.ops.feature_torch import apply, gradient

    x = torch.zeros(1, 16)
    return bool((apply(text, x) + gradient(text, x, torch.ones_like(x))).isfinite().all())


def weight_kind(weight: Tensor | None) -> str:
    """WEIGHT of the kernels."""
    if weight is None:
        return "none"
    return "mask" if weight.dtype in (torch.bool, torch.uint8) else "float"


def weight_column(weight: Tensor | None) -> Tensor | None:
    """A weight (*batch, M) as (*batch, M, 1), bool as bytes."""
    if weight is None:
        return None
    return (weight.view(torch.uint8) if weight.dtype == torch.bool else weight).unsqueeze(-1)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def run(
    kernel: Any, programs: int, *args: Any, tile: Tile, pdl: bool = False, **constants: Any
) -> Any:
    """Launch `programs` programs; Triton's compiled kernel. `pdl`: the kernel takes PDL, and on
    sm_90 may start before the previous kernel's last programs are done.
    """
    if pdl:
        constants["PDL"] = heuristics.overlaps_launches(args[0].device)
        if constants["PDL"]:
            constants["launch_pdl"] = True
    return kernel[(programs,)](
        *args, num_warps=tile.num_warps, num_stages=tile.num_stages, **constants
    )


def blocks(tile: Tile) -> dict[str, int]:
    """The block sizes, as the kernels name them."""
    return {
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_D": tile.BLOCK_D,
        "BLOCK_V": tile.BLOCK_V,
        "BLOCK_DN": tile.BLOCK_DN,
    }
