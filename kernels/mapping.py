"""φ(x) and its gradient as passes of their own, where the kernel that needs them holds part of a
row only and the map is row-wise (softmax, a norm).
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from bla_inductor.kernels import heuristics, launching
from bla_inductor.kernels.common import mapped, through_map
from bla_inductor.kernels.launching import Map
from torch import Tensor


@triton.jit
def map_kernel(
    X, G, OUT, ROWS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MAP: tl.constexpr, MAP_GRAD: tl.constexpr,
):  # fmt: skip
    """OUT = MAP(X), or G·MAP'(X); all (ROWS, D) dense."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < ROWS)[:, None] & (cols < D)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    x = tl.load(X + offsets, mask=mask, other=0.0)
    if MAP_GRAD is None:
        y = mapped(x, mask, MAP)
    else:
        y = through_map(x, tl.load(G + offsets, mask=mask, other=0.0), mask, MAP_GRAD)
    tl.store(OUT + offsets, y.to(OUT.dtype.element_ty), mask=mask)


def map_rows(x: Tensor, function: Map) -> Tensor:
    """φ(x), of x's shape and dtype."""
    return x if function.forward is None else _run(x, x, x.dtype, function.forward, None)


def map_gradient(x: Tensor, g: Tensor, function: Map) -> Tensor:
    """g·φ'(x) in fp32, for g in fp32."""
    return g if function.gradient is None else _run(x, g, torch.float32, None, function.gradient)


def _run(x: Tensor, g: Tensor, dtype: torch.dtype, forward: object, gradient: object) -> Tensor:
    x, g = x.contiguous(), g.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    D = x.shape[-1]
    tile = heuristics.map_tile(D)
    rows = x.numel() // D
    launching.run(
        map_kernel, -(-rows // tile.BLOCK_N), x, g, out, rows,
        D=D, BLOCK_D=tile.BLOCK_D, BLOCK_N=tile.BLOCK_N, MAP=forward, MAP_GRAD=gradient, tile=tile,
    )  # fmt: skip
    return out
