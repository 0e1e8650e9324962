"""The Autograd key, written by hand: `register_autograd` costs 25–60 µs a call, this 12–28.

Saved for backward: the inputs as given, the state and the key sum; never z, never the output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from bla_inductor.ops import aten, flops, forward_mode
from bla_inductor.ops.dispatch import gradient_orders
from bla_inductor.ops.schema import (
    RESULT_ONLY,
    gradients,
    lib,
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
)
from bla_inductor.ops.untraced import untraced


class _LinearAttention(torch.autograd.function._SingleLevelFunction):
    """inputs: q, k, v, q_norm, k_norm, key_weight, the keyword arguments as a dict, and whether
    forward mode is on for outer transforms of functorch (None: there are none); outputs: out,
    state, key_sum.
    """

    @staticmethod
    @untraced
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, kwargs, tangents = args
        # Below views as well: a result that is laid out as a view of its memory is no view to
        # autograd, which would refuse to have it, or a view of it, modified in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if tangents is None:
                out, state, key_sum = linear_attention_forward(*tensors, **kwargs)
            else:  # they differentiate this call again, and `Function` turned both modes off
                with torch.enable_grad(), _set_fwd_grad_enabled(tangents):
                    out, state, key_sum = linear_attention_forward(*tensors, **kwargs)
        ctx.save_for_backward(*tensors, state, key_sum)
        ctx.mark_non_differentiable(state, key_sum)
        ctx.set_materialize_grads(False)
        ctx.formula = {name: value for name, value in kwargs.items() if name not in RESULT_ONLY}
        return out, state, key_sum

    @staticmethod
    @untraced
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        do = output_grads[0]
        if do is None:
            return (None,) * 8
        *tensors, state, key_sum = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        orders = gradient_orders(tensors[:5])
        grads = linear_attention_backward(
            do, *tensors, state, key_sum, **ctx.formula, needs=needs, orders=orders
        )
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


# `torch.autograd.Function` would start again from the topmost functorch transform; at the Autograd
# key exactly one level is being handled, so its base is ours, as in torch's own transforms.
_cpp_apply = _LinearAttention.apply  # type: ignore[attr-defined]


def _apply(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    args = (*args, *(None,) * (6 - len(args)), kwargs)
    if not torch._C._are_functorch_transforms_active():
        return _cpp_apply(*args, None)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return _cpp_apply(*args, torch._C._is_fwd_grad_enabled())


def _differentiable(tensors: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in tensors if isinstance(t, Tensor)
    )


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    if forward_mode.active(args):
        return forward_mode.forward(*args, **kwargs)
    if _differentiable(args):
        return _apply(args, kwargs)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return linear_attention_forward(*args, **kwargs)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    if not flops.registered:
        flops.register_if_loaded()
    if forward_mode.active(args):
        return forward_mode.forward(*args, **kwargs)[0]
    if _differentiable(args):
        return _apply(args, kwargs)[0]
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return linear_attention(*args, **kwargs)


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Second and mixed derivatives: the backward's formula in differentiable operations, the state
    recomputed from k, v.
    """
    if not _differentiable(args) and not forward_mode.active(args):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return linear_attention_backward(*args, **kwargs)
    call = gradients(*args, **kwargs)
    x = call.inputs
    with aten.without_autocast(x.q.device.type):
        call.state, call.key_sum = aten.key_statistics(x)
        grads = aten.backward(call)
    return tuple(
        x.q.new_empty(0) if g is None or t is None else g.to(t.dtype)
        for t, g in zip(x.tensors, grads, strict=True)
    )


lib.impl("linear_attention", _attention, "Autograd")
lib.impl("linear_attention_forward", _forward, "Autograd")
lib.impl("linear_attention_backward", _backward, "Autograd")
