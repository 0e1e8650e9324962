"""Launch parameters for large tensors on sm_90, most of them with descriptors (tiles.py).

From sweeps on an H100 over 2 to 256 MiB a tensor, elu + 1 inside (docs/performance.md); those that
begin at 16 MiB were measured from 32 on. Compiled graphs decide, in which strides are numbers
(benchmarks/sweep_compiled.py). What is not in the tables keeps the tile of heuristics.py.
"""

from functools import cache

import torch
from bla_inductor.kernels.heuristics import Tile, block

from bla_inductor import compat

MIB = 1 << 20
# fp16 has factors beside each matrix (`held` in common.py), which take registers.
WHOLE_IN = (torch.bfloat16,)


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
    """`tile`, or the one of `kernel` for large tensors.

    kernel: "state", "weighted state" (float weights), "output", "gradient" (`output_kernel` with
    `raw` or `bias`), "query" or "key". sizes: D, Dv, D'. elements: of a tensor of queries or keys.
    steps: from one row to the next, of what is read; a descriptor takes none of 0.
    """
    D = sizes[0]
    if sizes != (D, D, D) or capability != 9 or 0 in steps:
        return tile
    if precision == "native":
        least, large = _large(kernel, D, tile.REST, dtype)
    else:
        least, large = _float32(kernel, D, precision)
    if large is None or elements * dtype.itemsize < least * MIB:
        return tile
    return tile if large.TMA and not compat.gives_kernels_memory() else large


@cache
def _large(kernel: str, D: int, rest: int, dtype: torch.dtype) -> tuple[int, Tile | None]:
    """(MiB of a tensor from which on it pays, the tile)."""
    d = block(D)
    if D > 128:
        return 4, _wide(kernel, D, dtype)
    if D < 64:
        return 16, _narrow(kernel, D, dtype)
    if kernel == "state" and D > 64:
        return 2, Tile(64, d, d, d, 8, 4 if D <= 80 else 3, 1, TMA=True)
    if kernel == "state" and D == 64:
        return 32, Tile(64, d, d, d, 4, 4, 1, TMA=True)
    if kernel == "output" and D > 64:
        return 16, Tile(64, d, d, d, 4, 3, 2, TMA=True)
    if kernel == "query" and D == 64:
        return 8, Tile(64, d, d, d, 4, 3, 2, TMA=True)
    if kernel == "query" and 64 < D <= 128 and dtype == torch.bfloat16 and not rest:
        rows, warps, resident = (16, 4, 2) if compat.fits_query_tiles() else (32, 8, 1)
        return 4 if D <= 96 else 32, Tile(rows, d, d, d, warps, 3, resident, TMA=True)
    if kernel == "key" and D == 64:
        return 64, Tile(128, d, d, d, 8, 3, 4)
    return 0, None


def _narrow(kernel: str, D: int, dtype: torch.dtype) -> Tile | None:
    """Head dims below 64."""
    if D <= 16 or (D > 32 and kernel in ("query", "key") and dtype not in WHOLE_IN):
        return None
    tiles = {
        ("output", 32): Tile(128, 32, 32, 32, 4, 4, 4),
        ("query", 32): Tile(64, 32, 32, 32, 2, 3, 4),
        ("key", 32): Tile(256, 32, 32, 32, 8, 3, 2),
        ("state", 64): Tile(64, 64, 64, 64, 4, 2, 4),
        ("output", 64): Tile(64, 64, 64, 64, 4, 3, 4),
        ("query", 64): Tile(64, 64, 64, 64, 4, 3, 2, TMA=True),
        ("key", 64): Tile(128, 64, 64, 64, 8, 2, 4),
    }
    return tiles.get((kernel, block(D)))


def _wide(kernel: str, D: int, dtype: torch.dtype) -> Tile | None:
    """Head dims above 128: φ once, not for each tile of Dv, but where Dv is in the accumulator."""
    d, scaled = block(D), dtype not in WHOLE_IN
    if D % 16 or (scaled and kernel != "state" and (kernel != "output" or D > 192)):
        return None  # it would spill
    tiles = {
        "state": Tile(64, d, 128, d, 8, 3, 1, TMA=True),
        "weighted state": Tile(32, d, 128, d, 8, 3, 1, TMA=True),
        "output": Tile(128, d, d, d, 8, 1, 1, TMA=True),
        "gradient": Tile(64, d, d, d, 8, 1, 1, TMA=True),
        "query": Tile(64 if compat.fits_query_tiles() else 32, d, d, d, 8, 2, 1, TMA=True),
    }
    if D <= 192:
        tiles["state"] = tiles["weighted state"] = Tile(32, d, 64, d, 4, 3, 2, TMA=True)
    if scaled:
        tiles["output"] = Tile(64, d, d, d, 8, 2, 1, TMA=True)
    return tiles.get(kernel)


def whole_query_pass(
    D: int, DV: int, DN: int, dtype: torch.dtype, precision: str, capability: int
) -> bool:
    """Whether the query pass of a head dim above 128 holds the whole state, in `query_pass_kernel`
    without dstate, rather than tiles of it (wide.py).
    """
    if not 128 < D == DV == DN or D % 16 or dtype not in WHOLE_IN:
        return False
    return precision == "native" and capability == 9


def pays_above_128(D: int, DV: int, dtype: torch.dtype, capability: int, gradients: bool) -> bool:
    """Whether these head dims, above 128, are faster here than as GEMMs of cuBLAS."""
    if capability != 9 or D != DV or D % 16 or not compat.gives_kernels_memory():
        return False
    return dtype in WHOLE_IN or (dtype == torch.float16 and D <= 192 and not gradients)


@cache
def _float32(kernel: str, D: int, precision: str) -> tuple[int, Tile | None]:
    """As `_large`, for fp32: "ieee" and "parts" at matmul precision "highest", "tf32" at "high"."""
    tiles = {
        ("state", "ieee", 64): Tile(32, 64, 64, 64, 4, 3, 3, TMA=True),
        ("output", "parts", 64): Tile(128, 64, 64, 64, 8, 3, 1, TMA=True),
        ("state", "tf32", 64): Tile(32, 64, 64, 64, 4, 4, 2, TMA=True),
        ("output", "tf32", 64): Tile(128, 64, 64, 64, 8, 3, 1, TMA=True),
        ("query", "tf32", 64): Tile(16, 64, 64, 64, 4, 3, 3, TMA=True),
        ("key", "tf32", 64): Tile(64, 64, 64, 64, 4, 2, 2),
        ("output", "tf32", 32): Tile(128, 32, 32, 32, 8, 3, 2),
        ("query", "tf32", 32): Tile(64, 32, 32, 32, 4, 2, 4),
    }
    if compat.fits_query_tiles():
        tiles["query", "parts", 64] = Tile(16, 64, 64, 64, 4, 3, 2, TMA=True)
    return 8, tiles.get((kernel, precision, D))
