"""Launch parameters from D, Dv, arithmetic and the number of multiprocessors; no autotuning.

A kernel's accumulators and the state it holds bound its tile: 16384 fp32 values are 64 registers a
thread with 8 warps. Operands in 4 bytes (tf32) take twice the shared memory and registers of 16-bit
ones, so their tiles are smaller. Every row is compiled ahead of time for sm_80, sm_90 and sm_100 in
tests/kernels and must not spill.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Block sizes (rows of the sequence, features, value channels, normaliser features), warps,
    pipeline stages.
    """

    BLOCK_N: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_DN: int
    num_warps: int
    num_stages: int


def block(size: int) -> int:
    """The power of two that holds `size`; tl.dot needs 16."""
    return max(16, 1 << (size - 1).bit_length())


def _warps(d: int, v: int, precision: str) -> int:
    return 4 if d * v <= 4096 and precision != "ieee" else 8


@cache
def state_tile(D: int, DV: int, DN: int, precision: str, capability: int) -> Tile:
    """`state_kernel`: accumulator BLOCK_D × BLOCK_V; on sm_100 it passes through tensor memory and
    registers both.
    """
    d, v = block(D), block(DV)
    if precision == "native":
        v = min(v, 16384 // d)
        if d == 256:
            return Tile(64, d, min(v, 32) if capability >= 10 else v, block(DN), 8, 2)
        return Tile(64, d, v, block(DN), _warps(d, v, precision), 3)
    v = min(v, 64)
    if precision == "ieee" and max(d, block(DN)) > 64:
        return Tile(16, d, v, block(DN), 8, 1)
    v = min(v, 8192 // d)
    return Tile(32, d, v, block(DN), _warps(d, v, precision), 2)


@cache
def output_tile(D: int, DV: int, DN: int, precision: str) -> Tile:
    """`output_kernel`: state tile BLOCK_D × BLOCK_V held, accumulator BLOCK_N × BLOCK_V."""
    d, v = block(D), block(DV)
    if precision == "native":
        v = min(v, 16384 // d)
        return Tile(64, d, v, block(DN), _warps(d, v, precision), 1 if d == 256 else 2)
    v = min(v, 64, (4096 if precision == "split" else 8192) // d)
    rows = 64 * 64 // max(64, d) if precision == "ieee" else 32 if d == 256 else 64
    warps = 8 if precision == "split" and d >= 128 else _warps(d, v, precision)
    return Tile(rows, d, v, block(DN), warps, 1 if d == 256 else 2)


@cache
def query_pass_tile(D: int, DV: int, DN: int, precision: str) -> Tile:
    """`query_pass_kernel`: state held and dstate accumulated (or not: `fused_query_pass`), both
    BLOCK_D × BLOCK_V.
    """
    d, v = block(D), block(DV)
    if precision == "ieee":
        rows, warps = (16, 8) if d * v <= 1024 else (32, 16)
        return Tile(rows, d, v, block(DN), warps, 1)
    rows = 64 if precision == "native" else 32
    return Tile(rows, d, v, block(DN), _warps(d, v, precision), 2)


@cache
def key_pass_tile(D: int, DV: int, DN: int, precision: str) -> Tile:
    """`key_pass_kernel`: dstate held, accumulators BLOCK_N × BLOCK_D and BLOCK_N × BLOCK_V."""
    d, v = block(D), block(DV)
    if precision == "native":
        return Tile(64, d, v, block(DN), _warps(d, v, precision), 2)
    rows = 32 if d * v >= 4096 else 64
    stages = 1 if d * v > 8192 or precision == "ieee" else 2
    return Tile(rows, d, v, block(DN), _warps(d, v, precision), stages)


@cache
def wide_query_tile(precision: str) -> Tile:
    """`wide_query_kernel`: everything in tiles of 64."""
    if precision == "ieee":
        return Tile(16, 64, 64, 64, 8, 1)
    return Tile(64 if precision == "native" else 32, 64, 64, 64, 4, 2)


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
    limit = 1024 if precision == "ieee" else 4096 if capability < 9 else 8192
    return block(D) * block(DV) <= limit


@cache
def capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device; 9 elsewhere (Triton's interpreter)."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 4 elsewhere (Triton's interpreter)."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def divide_rows(rows: int, programs: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """(rows a program, programs along the sequence), given how many `programs` run beside each
    other.

    Enough programs for eight a multiprocessor, but at least four tiles each, to be worth the state
    they read or write.
    """
    wanted = -(-8 * multiprocessors(device) // programs)
    splits = max(1, min(wanted, rows // (4 * tile.BLOCK_N)))
    each = -(-rows // splits)
    each = -(-each // tile.BLOCK_N) * tile.BLOCK_N
    return each, -(-rows // each)
