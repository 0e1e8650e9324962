"""vmap: batch dims are arbitrary, so the mapped dim goes in front and an unmapped tensor gets size
1 there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bla_inductor.ops.schema import (
    lib,
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
)


def _front(t: Tensor | None, dim: int | None) -> Tensor | None:
    if t is None:
        return None
    return t.unsqueeze(0) if dim is None else t.movedim(dim, 0)


def _shifted(orders: Sequence[int] | None, rank: int) -> list[int] | None:
    """Each permutation of `rank` dims in `orders`, with the mapped dim outermost."""
    if orders is None:
        return None
    starts = range(0, len(orders), rank)
    return [d for s in starts for d in (0, *(o + 1 for o in orders[s : s + rank]))]


def _forward_inputs(
    in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Tensor | None], dict[str, Any]]:
    tensors = [_front(t, d) for t, d in zip(args, in_dims, strict=False)]
    assert tensors[0] is not None
    order = _shifted(kwargs.get("out_order"), tensors[0].dim() - 1)
    return tensors, {**kwargs, "out_order": order}


def _attention(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
    tensors, kwargs = _forward_inputs(in_dims, args, kwargs)
    return linear_attention(*tensors, **kwargs), 0


def _forward(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    tensors, kwargs = _forward_inputs(in_dims, args, kwargs)
    out, state, key_sum = linear_attention_forward(*tensors, **kwargs)
    key_dims = [d for i, d in enumerate(in_dims) if i in (1, 2, 4, 5)]
    mapped = any(d is not None for d in key_dims)
    empty = kwargs.get("normalizer", "none") == "none"
    if not mapped:
        state = state.squeeze(0)
        key_sum = key_sum if empty else key_sum.squeeze(0)
    return (out, state, key_sum), (0, 0 if mapped else None, 0 if mapped and not empty else None)


def _backward(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Each sample has its own gradients: an unmapped tensor is expanded, not broadcast, or they
    would be summed.
    """
    front = [_front(t, d) for t, d in zip(args, in_dims, strict=True)]
    empty = kwargs.get("normalizer", "none") == "none"
    full = [
        args[i] if empty and i == 8 else t if t is None else t.expand(info.batch_size, *t.shape[1:])
        for i, t in enumerate(front)
    ]
    assert full[1] is not None
    orders = _shifted(kwargs.get("orders"), full[1].dim() - 1)
    grads = linear_attention_backward(*full, **{**kwargs, "orders": orders})
    dims = tuple(
        0 if need and t is not None else None
        for need, t in zip(kwargs["needs"], full[1:7], strict=True)
    )
    return grads, dims


torch.library.register_vmap("bla::linear_attention", _attention, lib=lib)
torch.library.register_vmap("bla::linear_attention_forward", _forward, lib=lib)
torch.library.register_vmap("bla::linear_attention_backward", _backward, lib=lib)
