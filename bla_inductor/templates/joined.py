"""What others compute, written beside the gradients that a template writes into one buffer."""

from __future__ import annotations

import torch
from torch._inductor import ir
from torch._inductor import lowering as inductor

from bla_inductor.templates.operands import Node

__all__ = ["write"]


def write(joined: Node, part: Node, dim: int, start: int) -> Node:
    """`joined`, with `part` written to [start, …) of `dim`, by the loop that computes it.

    Inductor's own `copy_` would have that loop store the part by itself as well, where it reuses
    the memory of what it reads.
    """
    sizes = list(part.get_size())
    slice_ = inductor.lowerings[torch.ops.aten.slice.Tensor]
    place = slice_(joined, dim, start, start + sizes[dim])
    value = ir.Pointwise.create(
        device=part.get_device(),
        dtype=part.get_dtype(),
        inner_fn=part.make_loader(),
        ranges=sizes,
    )
    ir.MutationLayoutSHOULDREMOVE.realize_into(value, place.data, unsafe_alias=True)
    return joined
