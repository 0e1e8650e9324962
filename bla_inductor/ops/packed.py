"""`torch.ops.bla.linear_attention_backward_packed`: the backward with some of its gradients written
straight into one buffer.

As `linear_attention_backward`, and two arguments more: `size` is that of the buffer, which is
dense; `places` holds, for every gradient that goes there, its number (0 for dq … 4 for dk_norm),
its offset and its strides. It returns the buffer, then the six gradients, of which those in the
buffer are (0,).

`torch.ops.bla.written_into(joined, part, dim, start)` is `joined` with `part` at [start, start +
part.shape[dim]) of `dim`. Inductor writes there, so nothing else may read `joined`.

Only `bla_inductor.packing` makes such calls, in graphs that are differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bla_inductor.ops.schema import lib, linear_attention_backward

__all__ = ["linear_attention_backward_packed", "split_places", "written_into"]

_arguments, _results = str(linear_attention_backward._schema).split("(", 1)[1].split(") -> (")
lib.define(
    f"linear_attention_backward_packed({_arguments}, int[] size, int[] places) -> "
    f"(Tensor packed, {_results}",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)

lib.define(
    "written_into(Tensor joined, Tensor part, int dim, int start) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)

linear_attention_backward_packed = torch.ops.bla.linear_attention_backward_packed.default
written_into = torch.ops.bla.written_into.default


def split_places(places: Sequence[int], rank: int) -> dict[int, tuple[int, list[int]]]:
    """(offset, strides) of each gradient in the buffer, by its number."""
    width = 2 + rank
    rows = [list(places[i : i + width]) for i in range(0, len(places), width)]
    return {number: (offset, strides) for number, offset, *strides in rows}


def _packed(
    do: Tensor, q: Tensor, *args: Any, size: Sequence[int], places: Sequence[int], **kwargs: Any
) -> tuple[Tensor, ...]:
    """The gradients, copied to their places: for where no kernel writes them there."""
    grads = list(linear_attention_backward(do, q, *args, **kwargs))
    packed = q.new_empty(size)
    for i, (offset, strides) in split_places(places, q.dim()).items():
        packed.as_strided(grads[i].shape, strides, offset).copy_(grads[i])
        grads[i] = q.new_empty(0)
    return packed, *grads


def _fake(
    do: Tensor, q: Tensor, *args: Any, size: Sequence[int], places: Sequence[int], **kwargs: Any
) -> tuple[Tensor, ...]:
    grads = list(linear_attention_backward(do, q, *args, **kwargs))
    for i in split_places(places, q.dim()):
        grads[i] = q.new_empty(0)
    return q.new_empty(size), *grads


def _written_into(joined: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    result = joined.clone()
    result.narrow(dim, start, part.shape[dim]).copy_(part)
    return result


def _fake_written_into(joined: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    return joined.clone()


lib.impl("written_into", _written_into, "CompositeExplicitAutograd")
torch.library.register_fake("bla::written_into", _fake_written_into, lib=lib)
lib.impl("linear_attention_backward_packed", _packed, "CompositeExplicitAutograd")
torch.library.register_fake("bla::linear_attention_backward_packed", _fake, lib=lib)
