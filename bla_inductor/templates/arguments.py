"""The operators' arguments as templates need them: static head dims, numbers as text, hints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._inductor import lowering as inductor
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from bla_inductor.kernels import heuristics, large
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.templates.operands import Expr, Node, equal


def static(size: Expr) -> int:
    """A size that the kernel is compiled for; a symbol is specialised."""
    return int(V.graph.sizevars.guard_int(size))


def hint(size: Expr) -> int:
    """The size of the example that is being compiled: for choices, never for results."""
    return int(V.graph.sizevars.optimization_hint(size, fallback=8192))


def broadcast(shapes: Sequence[Sequence[Expr]]) -> list[Expr]:
    """The common shape of equally long shapes whose sizes are equal or 1."""
    return [next((s for s in sizes if not equal(s, 1)), 1) for sizes in zip(*shapes, strict=True)]


def product(sizes: Sequence[Expr]) -> Expr:
    result: Expr = 1
    for size in sizes:
        result = result * size
    return result


def empty(size: Sequence[Expr], dtype: torch.dtype, device: torch.device) -> Node:
    """An uninitialised dense buffer, for a kernel to write."""
    return inductor.empty_strided(list(size), None, dtype=dtype, device=device)


def weight_kind(weight: Node | None) -> str:
    """WEIGHT of the kernels."""
    if weight is None:
        return "none"
    return "mask" if weight.get_dtype() in (torch.bool, torch.uint8) else "float"


def divided(rows: Expr, programs: Expr, tile: Tile, device: torch.device) -> tuple[int, Expr]:
    """(rows a program, programs along the sequence), the latter symbolic where `rows` is: a graph
    compiled at one length runs at others, and then takes more or fewer programs of this size.
    """
    each, _ = heuristics.divide_rows(hint(rows), hint(programs), tile, device)
    return each, CeilDiv(rows, each)


def for_large(
    kernel: str,
    tile: Tile,
    sizes: tuple[int, int, int],
    precision: str,
    elements: Expr,
    read: Sequence[Node],
) -> Tile:
    """`kernels.large.for_large`, for what `kernel` reads. Generated C++ may not give a kernel the
    memory that descriptors take.
    """
    if V.graph.cpp_wrapper:
        return tile
    steps = tuple(int(not equal(x.get_stride()[-2], 0)) for x in read)
    capability = heuristics.capability(read[0].get_device())
    dtype = read[0].get_dtype()
    return large.for_large(kernel, tile, sizes, dtype, precision, capability, hint(elements), steps)


def is_static(*sizes: Expr) -> bool:
    return not any(getattr(size, "free_symbols", None) for size in sizes)


def blocks(tile: Tile) -> dict[str, int]:
    """The block sizes, as the kernels name them."""
    return {
        "BLOCK_D": tile.BLOCK_D,
        "BLOCK_V": tile.BLOCK_V,
        "BLOCK_DN": tile.BLOCK_DN,
        "BLOCK_N": tile.BLOCK_N,
    }
