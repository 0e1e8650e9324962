"""Shapes, dtypes and exact strides of the results, for fake and meta tensors; installs no
guards.
"""

from typing import Any

import torch
from torch import Tensor

from bla_inductor.ops.aten import accumulation_dtype
from bla_inductor.ops.checks import check_arguments
from bla_inductor.ops.layout import empty_dense, key_batch, query_batch
from bla_inductor.ops.schema import Inputs, gradients, lib


def _out(x: Inputs) -> Tensor:
    check_arguments(x)
    sizes = [*query_batch(x.tensors), x.q.shape[-2], x.v.shape[-1]]
    return empty_dense(x.q, sizes, x.out_dtype or x.q.dtype, x.out_order)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return _out(Inputs(*args, **kwargs))


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Inputs(*args, **kwargs)
    batch = key_batch(x.k, x.v, x.k_norm, x.key_weight)
    acc = accumulation_dtype(x.q.dtype)
    key_sum = [*batch, x.key_norm.shape[-1]] if x.normalized else [0]
    return (
        _out(x),
        empty_dense(x.q, [*batch, x.k.shape[-1], x.v.shape[-1]], acc, None),
        empty_dense(x.q, key_sum, acc, None),
    )


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = gradients(*args, **kwargs)
    return tuple(
        empty_dense(t, t.shape, t.dtype, call.order(i))
        if t is not None and need
        else call.inputs.q.new_empty(0)
        for i, (t, need) in enumerate(zip(call.inputs.tensors, call.needs, strict=True))
    )


torch.library.register_fake("bla::linear_attention", _attention, lib=lib)
torch.library.register_fake("bla::linear_attention_forward", _forward, lib=lib)
torch.library.register_fake("bla::linear_attention_backward", _backward, lib=lib)
