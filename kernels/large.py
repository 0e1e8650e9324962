"""Launch parameters for large tensors on sm_90, most of them with descriptors (tiles.py).

From sweeps on an H100 over 4 to 168 MiB a tensor, bf16 and fp16, elu + 1 inside
(docs/performance.md). What is not in the tables keeps the tile of heuristics.py: up to 32 features
rows are too short for descriptors to pay, and the output and key passes of most head dims gain
nothing.
"""

from functools import cache

import torch
from bla_inductor.kernels.heuristics import Tile, block

from bla_inductor import compat

LARGE = 16 << 20  # bytes of a tensor of queries; below, making a descriptor takes what it saves


def for_large(
    kernel: str,
    tile: Tile,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
    capability: int,
    elements: int,
    steps: tuple[int, ...],
) -> Tile:
    """`tile`, or the one of `kernel` ("state", "output", "query" or "key") for large tensors.

    sizes: D, Dv, D'. elements: of a tensor of queries or keys. steps: from one row to the next, of
    what is read; a descriptor takes none of 0.
    """
    D = sizes[0]
    if sizes != (D, D, D) or precision != "native" or capability != 9 or 0 in steps:
        return tile
    chosen = tile if elements * dtype.itemsize < LARGE else _large(kernel, D, tile)
    return tile if chosen.TMA and not compat.gives_kernels_memory() else chosen


@cache
def _large(kernel: str, D: int, tile: Tile) -> Tile:
    d = block(D)
    if not 32 < D <= 128:
        return tile
    if kernel == "state":
        if D <= 64:
            return Tile(64, d, d, d, 4, 4, 1, TMA=True)
        return Tile(64, d, d, d, 8, 4 if D <= 80 else 3, 1, TMA=True)
    if kernel == "output" and 64 < D <= 80:
        return Tile(128, d, d, d, 8, 4, 1, TMA=True)
    if kernel == "query" and D >= 64:
        if tile.REST:
            return Tile(32, 64, 64, 64, 4, 3, 2, tile.REST, TMA=True)
        return Tile(64 if D == 64 else 16, d, d, d, 4, 3, 2, TMA=True)
    if kernel == "key" and D == 64:
        return Tile(128, d, d, d, 8, 3, 4)
    return tile
