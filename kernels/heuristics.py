"""Launch parameters from D, Dv, arithmetic and the number of multiprocessors; no autotuning.

A kernel's accumulators and the state it holds bound its tile: 16384 fp32 values are 64 registers a
thread with 8 warps. Operands in 4 bytes (tf32) take twice the shared memory and registers of 16-bit
ones, so their tiles are smaller. Every row is compiled ahead of time for sm_80, sm_90 and sm_100 in
tests/kernels and must not spill.
"""

from dataclasses import dataclass
from functools import cache

import torch

from bla_inductor import compat


@dataclass(frozen=True)
class Tile:
    """Block sizes (rows of the sequence, features, value channels, normaliser features), warps,
    pipeline stages, and how many programs are meant to run on one multiprocessor at a time.

    REST: where it is not 0, the columns beyond the blocks are a second piece (two_pieces.py). TMA:
    whether tiles are read by descriptors (tiles.py).
    """

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_DN: int
    num_warps: int
    num_stages: int
    resident: int = 4
    REST: int = 0
    TMA: bool = False


SUM_TILE = Tile(512, 16, 16, 16, 4, 1)


def block(size: int) -> int:
    """The power of two that holds `size`; tl.dot needs 16."""
    return max(16, 1 << (size - 1).bit_length())


def _warps(d: int, v: int, precision: str) -> int:
    return 4 if d * v <= 4096 and precision != "ieee" else 8


IN_TWO_PIECES = (torch.bfloat16,)


def in_two_pieces(
    kernel: str, dtype: torch.dtype, D: int, DV: int, DN: int, precision: str, capability: int
) -> Tile | None:
    """The tile of the backward's "query" or "key" pass in two pieces of D, where that is faster
    than D padded: measured on an H100 at 72, 80 and 96, where fp16, with its factors, is slower.
    """
    if not D == DV == DN or not 64 < D <= 96 or precision != "native" or capability != 9:
        return None
    rest = block(D - 64)
    if dtype not in IN_TWO_PIECES or (kernel == "query" and rest > 16):
        return None
    if kernel == "key":
        if D % 16:
            return None
        if rest > 16:
            return Tile(64, 64, 64, 64, 4, 3, 1, rest)
        return Tile(128, 64, 64, 64, 8, 3, 1, rest)
    return Tile(64, 64, 64, 64, 4, 3, 2, rest)


@cache
def state_tile(
    D: int, DV: int, DN: int, precision: str, capability: int, plain: bool = True
) -> Tile:
    """`state_kernel`: accumulator BLOCK_D × BLOCK_V; on sm_100 it passes through tensor memory and
    registers both. plain: neither weights, nor a k' of its own, nor exact sums, which take
    registers.
    """
    d, v = block(D), block(DV)
    if precision == "native":
        v = min(v, 16384 // d)
        if d > 32 and capability >= 10 and not compat.pipelines_a_shared_operand():
            rows = 32 if d * v <= 4096 else 16
            return Tile(rows, d, v, block(DN), 16, 3, 1)  # tensor memory is for 4 or 8 warps
        if d == 256:
            return Tile(32, d, min(v, 32) if capability >= 10 else v, block(DN), 8, 3, 2)
        if max(d, v, block(DN)) <= 16:
            return Tile(128, d, v, block(DN), 2, 3, 8)
        if max(d, v, block(DN)) <= 32:
            if capability == 9:
                return Tile(64, d, v, block(DN), 2, 3, 4)
            return Tile(256, d, v, block(DN), 4, 2, 2)
        if d * v <= 4096:
            if capability == 9 and D < 64:
                return Tile(64, d, v, block(DN), 4, 3, 2)
            return Tile(128, d, v, block(DN), 8, 2, 2)
        if capability < 9:
            return Tile(64, d, min(v, 64), block(DN), 8, 3, 1)
        if plain and capability == 9:
            return Tile(32, d, v, block(DN), 4, 4, 2)
        return Tile(64, d, v, block(DN), 8, 4, 1)
    v = min(v, 64)
    if precision == "ieee" and max(d, block(DN)) > 64:
        return Tile(16, d, min(v, 8192 // d), block(DN), 8, 1)
    v = min(v, 8192 // d)
    return Tile(32, d, v, block(DN), _warps(d, v, precision), 2)


@cache
def output_tile(D: int, DV: int, DN: int, precision: str, capability: int) -> Tile:
    """`output_kernel`: state tile BLOCK_D × BLOCK_V held, accumulator BLOCK_N × BLOCK_V."""
    d, v = block(D), block(DV)
    if precision == "native" or (precision == "pair" and d * v <= 4096):
        v = min(v, 16384 // d)
        if d == 256:
            return Tile(64, d, v, block(DN), 8, 1, 2)
        if max(d, v, block(DN)) <= 16:
            return Tile(128, d, v, block(DN), 4, 3, 4)
        if max(d, v, block(DN)) <= 32:
            return Tile(64, d, v, block(DN), 4, 3, 4)
        if d * v <= 4096:
            if capability == 9 and D < 64:
                return Tile(64, d, v, block(DN), 4, 3, 16)
            return Tile(128, d, v, block(DN), 8, 3, 16)
        if capability < 9:
            return Tile(64, d, min(v, 64), block(DN), 8, 2, 2)
        if D >= 112:
            return Tile(128, d, v, block(DN), 8, 3, 1)
        return Tile(64, d, v, block(DN), 4, 3, 2)
    if precision == "parts":
        return Tile(64, d, min(v, 64), block(DN), 4 if capability >= 9 else 8, 2, 2)
    if precision == "split" and max(d, v, block(DN)) <= 32:
        return Tile(128, d, v, block(DN), 8, 3, 2)
    in_parts = precision in ("pair", "split")
    v = min(v, 64, (4096 if in_parts else 8192) // d)
    if precision == "ieee":
        rows = 32 * 64 // max(64, d)
    else:
        rows = 32 if d == 256 else 64
    warps = 8 if in_parts and d >= 128 else _warps(d, v, precision)
    return Tile(rows, d, v, block(DN), warps, 1 if d == 256 else 2)


@cache
def query_pass_tile(
    D: int,
    DV: int,
    DN: int,
    precision: str,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    decoupled: bool = False,
) -> Tile:
    """`query_pass_kernel`: state held and dstate accumulated (or not: `fused_query_pass`), both
    BLOCK_D × BLOCK_V.
    """
    d, v = block(D), block(DV)
    if precision == "ieee":
        return Tile(16, d, v, block(DN), 8, 1)
    if precision == "parts":
        return Tile(16, d, v, block(DN), 4 if capability >= 9 else 8, 2, 2)
    if precision == "native" or (precision == "pair" and d * v <= 4096):
        if d * v <= 4096:
            if not fused_query_pass(D, DV, precision, capability) or capability < 9:
                return Tile(32, d, v, block(DN), 8, 2, 2)
            return Tile(64, d, v, block(DN), 8 if precision == "pair" and d > 32 else 4, 3, 2)
        if d * v > 16384:  # without dstate, see large.py
            return Tile(32, d, v, block(DN), 8, 2, 1)
        fits = dtype != torch.float16 and compat.fits_query_tiles()  # else it spills
        if capability == 9 and max(D, DV) <= 96 and fits:
            return Tile(16, d, v, block(DN), 4, 3, 2)
        return Tile(32, d, v, block(DN), 8, 2 if decoupled else 3, 1)
    return Tile(32, d, v, block(DN), _warps(d, v, precision), 2)


@cache
def key_pass_tile(D: int, DV: int, DN: int, precision: str, capability: int) -> Tile:
    """`key_pass_kernel`: dstate held, accumulators BLOCK_N × BLOCK_D and BLOCK_N × BLOCK_V."""
    d, v = block(D), block(DV)
    if precision == "native" or (precision == "pair" and d * v <= 4096):
        if d * v <= 1024:
            return Tile(128, d, v, block(DN), 8, 3, 2)
        if d * v <= 4096:
            return Tile(64, d, v, block(DN), 8, 4, 4)
        if capability < 9:
            return Tile(64, d, v, block(DN), 8, 2, 2)
        return Tile(64, d, v, block(DN), 8, 3, 4 if d == D or D % 16 else 1)
    if precision == "ieee":
        return Tile(32, d, v, block(DN), 16 if d * v >= 4096 else 8, 1)
    if precision == "parts":
        return Tile(16, d, v, block(DN), 4, 3, 16)
    rows = 32 if d * v >= 4096 else 64
    stages = 1 if d * v > 8192 else 2
    return Tile(rows, d, v, block(DN), _warps(d, v, precision), stages)


@cache
def wide_query_tile(precision: str) -> Tile:
    """`wide_query_kernel`: everything in tiles of 64."""
    if precision == "ieee":
        return Tile(16, 64, 64, 64, 8, 1)
    return Tile(64 if precision == "native" else 32, 64, 64, 64, 4, 2)


@cache
def map_tile(D: int) -> Tile:
    """`map_kernel`: 2048 elements a program."""
    d = block(D)
    return Tile(max(1, 2048 // d), d, 16, 16, 4, 1)


@cache
def wide_backward(D: int, DV: int, DN: int, precision: str, capability: int) -> bool:
    """Whether the backward runs in tiles of the head dims (wide.py) because one block a pass does
    not fit.

    128 × 128 needs more than the 99 KiB of shared memory of sm_86 and sm_89; the CUDA cores read
    from registers.
    """
    if precision == "ieee":
        limit = 4096
    else:  # tf32x2 keeps two parts of the state in shared memory
        limit = 8192 if capability < 9 or precision == "tf32x2" else 16384
    return max(D, DV, DN) > 128 or block(D) * block(DV) > limit


@cache
def fused_query_pass(D: int, DV: int, precision: str, capability: int) -> bool:
    """Whether the query pass also accumulates dstate, beside the state that it holds.

    It does where both fit into registers: mma on sm_8x wants the state there too, the CUDA cores
    want everything.
    """
    in_16_bits = precision in ("native", "pair")
    if in_16_bits and capability >= 10 and not compat.pipelines_inline_assembly():
        return block(D) * block(DV) <= 1024
    if precision == "native" and capability >= 9:
        return block(D) * block(DV) <= 16384
    if precision == "parts":
        limit = 4096 if capability >= 9 else 1024
    else:
        limit = 1024 if precision == "ieee" else 4096 if capability < 9 else 8192
    if precision == "pair":
        limit = 4096
    return block(D) * block(DV) <= limit


@cache
def capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device; 9 elsewhere (Triton's interpreter).

    8 for sm_120, which has the tensor cores and the shared memory of sm_89.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return 8 if major >= 12 else major


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the last programs of the previous one run."""
    return device.type != "cpu" and capability(device) >= 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 elsewhere (Triton's interpreter)."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def divide_rows(rows: int, programs: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """(rows a program, programs along the sequence), given how many `programs` run beside each
    other.
    """
    return _divide(rows, programs, tile, multiprocessors(device))


@cache
def _divide(rows: int, programs: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """The division whose last program ends first, if programs start in waves of `slots`.

    A program costs its rows, and as much as BLOCK_D + 32 rows for its start and its partial state.
    After a few waves programs no longer start together, and the last wave costs half. Where 16
    warps a multiprocessor have work, a program has at least four tiles.
    """
    slots = tile.resident * multiprocessors
    best = (0.0, rows, 1)
    for splits in range(1, max(1, min(64, rows // (2 * tile.BLOCK_N))) + 1):
        each = -(-rows // (splits * tile.BLOCK_N)) * tile.BLOCK_N
        used = -(-rows // each)
        enough = programs * used * tile.num_warps > 16 * multiprocessors
        if splits > 1 and enough and each < 4 * tile.BLOCK_N:
            break
        waves = programs * used / slots
        waves = waves + 0.5 if waves > 3 else float(-(-programs * used // slots))
        cost = waves * (each + tile.BLOCK_D + 32)
        if best[0] == 0.0 or cost < best[0]:
            best = (cost, each, used)
    return best[1], best[2]
