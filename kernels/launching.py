"""How every kernel is launched, and what optional arguments look like."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
    """A feature map as kernels take it: functions, or None for the identity.

    elementwise: it has no stage that looks at a whole row.
    """

    text: str = ""
    forward: Any = None
    gradient: Any = None
    elementwise: bool = True


class Maps(NamedTuple):
    """The feature maps of a call."""

    q: Map
    k: Map
    q_norm: Map
    k_norm: Map


@cache
def feature_map(text: str, dtype: torch.dtype) -> Map:
    """The compiled feature map of a text, for tensors of `dtype`; "" is the identity. It has to be
    finite at 0, with which rows beyond the last meet it, to be multiplied by 0 afterwards.
    """
    if not text:
        return Map()
    from bla_inductor.kernels.feature_map import compiled

    from bla_inductor.ops.feature_map import has_rows

    functions = compiled(text, fast=dtype != torch.float32)
    return Map(text, functions.forward, functions.backward, not has_rows(text))


def feature_maps(texts: Sequence[str], dtype: torch.dtype) -> Maps:
    """Those of a call, in the order q, k, q_norm, k_norm."""
    return Maps(*(feature_map(text, dtype) for text in texts))


def norm_kind(normalized: bool, k_norm: Tensor | None) -> str:
    """NORM of the kernels."""
    if not normalized:
        return "none"
    return "coupled" if k_norm is None else "decoupled"


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
