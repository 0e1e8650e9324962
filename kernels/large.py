"""Launch parameters for large tensors on sm_90, most of them with descriptors (tiles.py).

From sweeps on an H100 over 2 to 256 MiB a tensor, bf16 and fp16, elu + 1 inside
(docs/performance.md). What is not in the table keeps the tile of heuristics.py: below 64 features
rows are too short for descriptors to pay, and the output and key passes of most head dims gain
nothing, nor do the passes in two pieces.
"""

from functools import cache

import torch
from bla_inductor.kernels.heuristics import Tile, block

from bla_inductor import compat

MIB = 1 << 20


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
    least, large = _large(kernel, D, tile.REST, dtype)
    if large is None or elements * dtype.itemsize < least * MIB:
        return tile
    return tile if large.TMA and not compat.gives_kernels_memory() else large


@cache
def _large(kernel: str, D: int, rest: int, dtype: torch.dtype) -> tuple[int, Tile | None]:
    """(MiB of a tensor from which on it pays, the tile)."""
    d = block(D)
    if kernel == "state" and D > 128:
        narrow = Tile(32, d, 64, d, 4, 3, 2, TMA=True)
        return 8, narrow if D <= 192 else Tile(32, d, 128, d, 8, 3, 1, TMA=True)
    if kernel == "state" and D > 64:
        return 2, Tile(64, d, d, d, 8, 4 if D <= 80 else 3, 1, TMA=True)
    if kernel == "state" and D == 64:
        return 32, Tile(64, d, d, d, 4, 4, 1, TMA=True)
    if kernel == "output" and 128 < D <= (256 if dtype == torch.bfloat16 else 192):
        return 8, Tile(64, d, d, d, 8, 2, 1, TMA=True)  # φ once, not for each tile of Dv
    if kernel == "output" and 64 < D <= 80:
        return 32, Tile(128, d, d, d, 8, 4, 1, TMA=True)
    if kernel == "query" and D == 64:
        return 8, Tile(64, d, d, d, 4, 3, 2, TMA=True)
    if kernel == "query" and 64 < D <= 128 and dtype == torch.bfloat16 and not rest:
        rows, warps, resident = (16, 4, 2) if compat.fits_sixteen_rows() else (32, 8, 1)
        return 4 if D <= 96 else 32, Tile(rows, d, d, d, warps, 3, resident, TMA=True)
    if kernel == "key" and D == 64:
        return 64, Tile(128, d, d, d, 8, 3, 4)
    return 0, None
