"""Where the kernels write the result: its dims in memory, as the next kernel reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._inductor import ir
from torch._inductor import lowering as inductor

from bla_inductor.templates import arguments
from bla_inductor.templates.operands import Node, Operands
from bla_inductor.templates.readers import read_as_channels_last, readers_shape, segments

if TYPE_CHECKING:
    from bla_inductor.templates.forward import Call


class Result:
    """The result's place in memory.

    sizes: of its dims. segments: for adjacent dims of the result, in memory's order, the sizes that
    the output has for them. The output has the dims in which the result is read, since before 2.13
    Inductor fuses only loops of the same rank; where that is unknown, heads merged with channels.
    """

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        self.sizes = [*call.query_batch, call.N, call.DV]
        self._order = list(call.x.out_order or range(len(self.sizes)))
        memory = [self.sizes[d] for d in self._order]
        cut = segments(memory, readers_shape())
        # Dims that only meet as several on both sides are read in another order.
        if cut is None or any(n > 1 and len(sizes) > 1 for n, sizes in cut):
            last = 2 if len(memory) > 2 and self._order[-2] != len(memory) - 2 else 1
            cut = [(1, [size]) for size in memory[:-last]]
            cut.append((last, [arguments.product(memory[-last:])]))
        order = iter(self._order)
        self.segments = [([next(order) for _ in range(n)], sizes) for n, sizes in cut]
        if read_as_channels_last():
            self._move_channels_last()
        sizes = [size for _, some in self.segments for size in some]
        strides = ir.FlexibleLayout.contiguous_strides(sizes)
        self.layout = ir.FixedLayout(call.device, dtype, sizes, strides)

    def _move_channels_last(self) -> None:
        """Reorder memory for a reader of (B, C, H, W), if each of these is whole segments and the
        innermost of C is a value channel: what has its heads there, as (B, heads, N, Dv), is no
        image.
        """
        starts = [0]
        for _, sizes in self.segments:
            starts.append(starts[-1] + len(sizes))
        if {1, 2} <= set(starts) and starts[-1] == 4:
            first, then = starts.index(1), starts.index(2)
            channels = self.segments[first:then]
            if channels[-1][0][-1] != len(self.sizes) - 1:
                return
            self.segments = [*self.segments[:first], *self.segments[then:], *channels]
            self._order = [d for dims, _ in self.segments for d in dims]

    def logical(self, node: Node) -> Node:
        """The template's output with the dims of the result."""
        node = inductor.view(node, [self.sizes[d] for d in self._order])
        return inductor.permute(node, [self._order.index(d) for d in range(len(self.sizes))])

    def indices(self, operands: Operands) -> tuple[str, str]:
        """(the lines that compute the index of each dim of the output, these indices' names)."""
        lines, rest = [], "batch.to(INDEX_DTYPE)"
        rank = len(self.sizes)
        for d in reversed(range(rank - 2)):
            size = operands.expression(self.sizes[d])
            lines.append(f"o_{d} = {rest} % {size}" if d else f"o_{d} = {rest}")
            rest = f"{rest} // {size}"
        lines.append(f"o_{rank - 2} = rows.to(INDEX_DTYPE)[:, None]")
        lines.append(f"o_{rank - 1} = cv[None, :]")
        names: list[str] = []
        for dims, sizes in self.segments:
            index = f"o_{dims[0]}"
            for d in dims[1:]:
                index = f"({index}) * {operands.expression(self.sizes[d])} + o_{d}"
            own = [f"idx_{len(names) + i}" for i in range(len(sizes))]
            for name, size in zip(reversed(own[1:]), reversed(sizes[1:]), strict=True):
                lines.append(f"{name} = ({index}) % {operands.expression(size)}")
                index = f"({index}) // {operands.expression(size)}"
            lines.append(f"{own[0]} = {index}")
            names += own
        text = "\n".join(f"        {line}" for line in lines)
        return text, ", ".join(f'"{name}"' for name in names)
