"""Calls of `bla::piecewise_sparse_attention` on operands of any layout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bla_inductor.ops.piecewise_aten import chosen_count
from tests.fuzz.operands import FLOATS, Layout, layouts

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from piecewise_formula import means, plain

__all__ = ["PiecewiseCall", "assert_selected", "formula_of", "piecewise_calls"]


@dataclass(frozen=True)
class PiecewiseCall:
    """Shapes and layouts of q, k, v; and the options."""

    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout, ...]
    incoming: Layout
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    density: float
    block_size: int
    scale: float | None
    out_order: tuple[int, ...] | None
    needs: tuple[bool, ...]
    seed: int

    @property
    def number(self) -> float:
        """The scale."""
        return self.shapes[0][-1] ** -0.5 if self.scale is None else self.scale

    @property
    def count(self) -> int:
        """How many key blocks a query block selects."""
        return chosen_count(self.density, -(-self.shapes[1][-2] // self.block_size))

    def operands(self) -> list[Tensor]:
        """q, k, v."""
        generator = torch.Generator().manual_seed(self.seed)
        return [self._made(s, p, generator) for s, p in zip(self.shapes, self.layouts, strict=True)]

    def gradient(self) -> Tensor:
        """The incoming gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return self._made(self.out_shape, self.incoming, generator)

    def _made(self, shape: tuple[int, ...], layout: Layout, generator: torch.Generator) -> Tensor:
        size = layout.base_shape(shape)
        base = torch.randn(size, generator=generator, dtype=torch.float64)
        return layout.view(base.to(self.dtype), shape)


@st.composite
def piecewise_calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    blocks: tuple[int, ...] = (16, 1, 3, 7, 32, 128),
    shortest: int = 0,
) -> PiecewiseCall:
    """Any call of a few blocks."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    batch = [pick(2, 1, 3) for _ in range(pick(1, 0, 2))]
    n, m = pick(20, *([0] if not shortest else []), 1, 2, 33, 50), pick(40, 1, 2, 16, 33, 70)
    d, dv = pick(4, 1, 3, 8, 17), pick(4, *([0] if not shortest else []), 1, 3, 8, 17)

    def sizes(*last: int) -> tuple[int, ...]:
        return (*(1 if draw(st.booleans()) else size for size in batch), *last)

    shapes = sizes(n, d), sizes(m, d), sizes(m, dv)
    # Of one key the weight is 1: what is left of the gradients of q and k is rounding.
    differentiable = m > 1, m > 1, True
    out_shape = (*torch.broadcast_shapes(*(s[:-2] for s in shapes)), n, dv)
    return PiecewiseCall(
        shapes,
        tuple(draw(layouts(shape)) for shape in shapes),
        draw(layouts(out_shape)),
        out_shape,
        draw(st.sampled_from(dtypes)),
        pick(0.3, 0.01, 0.5, 1.0),
        draw(st.sampled_from(blocks)),
        pick(None, 0.2),
        tuple(draw(st.permutations(list(range(len(out_shape)))))) if pick(False, True) else None,
        tuple(able and draw(st.booleans()) for able in differentiable),
        draw(st.integers(0, 99)),
    )


def assert_selected(chosen: Tensor, call: PiecewiseCall, operands: list[Tensor]) -> None:
    """Each query block has `count` key blocks; no other has a clearly larger score."""
    q, k = (x.double() for x in operands[:2])
    scores = means(q, call.block_size) @ means(k, call.block_size).mT
    scores = scores.expand(chosen.shape)
    assert (chosen.sum(-1) == call.count).all()
    least = scores.masked_fill(~chosen, torch.inf).amin(-1)
    most = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (least >= most - 1e-5).all()


def formula_of(
    call: PiecewiseCall, chosen: Tensor, gradients: bool, wide: bool = False
) -> Callable[[list[Any]], dict[str, Tensor]]:
    """The formula with the blocks in `chosen`, in the call's dtype or in fp64: from q, k, v to the
    output, and the needed gradients.
    """
    do = call.gradient()

    def results(operands: list[Any]) -> dict[str, Tensor]:
        leaves = [(x.double() if wide else x).detach() for x in operands]
        leaves = [x.requires_grad_(need) for x, need in zip(leaves, call.needs, strict=True)]
        out = plain(*leaves, chosen, call.block_size, call.number)
        wanted = {n: x for n, x in zip(("dq", "dk", "dv"), leaves, strict=True) if x.requires_grad}
        if not gradients or not wanted:
            return {"out": out.detach()}
        grads = torch.autograd.grad(out, list(wanted.values()), do.to(out.dtype))
        return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}

    return results
