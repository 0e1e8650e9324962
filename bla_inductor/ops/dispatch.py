"""Which implementation runs: Triton for CUDA tensors it covers, ATen for everything else.

ATen takes over on CUDA where Triton is missing, for float64, for tensors without elements, for
feature maps that have no value at zero, and, with a warning, where Triton does not compile a kernel
for this GPU. Head dims above the kernels' limit are an error there, not a silent change of
algorithm.
"""

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bla_inductor import failures
from bla_inductor.ops import aten
from bla_inductor.ops.checks import check_arguments
from bla_inductor.ops.feature_torch import finite_at_zero
from bla_inductor.ops.layout import dense_order, empty_dense, key_batch, query_batch
from bla_inductor.ops.schema import TENSORS, Gradients, Inputs, gradients, lib

log = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _attention_aten(*args: Any, **kwargs: Any) -> Tensor:
    return _run_aten(Inputs(*args, **kwargs), keep_state=False)[0]


def _forward_aten(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run_aten(Inputs(*args, **kwargs), keep_state=True)  # type: ignore[return-value]


def _run_aten(x: Inputs, *, keep_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    check_arguments(x)
    with aten.without_autocast(x.q.device.type):
        out, state, key_sum = aten.forward(x, keep_state=keep_state)
    return aten.dense(out, x.out_dtype or x.q.dtype, x.out_order), state, key_sum


def _backward_aten(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _run_backward_aten(gradients(*args, **kwargs))


def _run_backward_aten(call: Gradients) -> tuple[Tensor, ...]:
    with aten.without_autocast(call.do.device.type):
        grads = aten.backward(call)
    return tuple(
        call.inputs.q.new_empty(0)
        if grad is None or t is None
        else aten.dense(grad, t.dtype, call.order(i))
        for i, (t, grad) in enumerate(zip(call.inputs.tensors, grads, strict=True))
    )


def _have_numbers_at_zero(x: Inputs) -> bool:
    return all(finite_at_zero(text, x.q.dtype) for text in x.maps)


def _kernels(x: Inputs, out_dtype: torch.dtype) -> ModuleType | None:
    """The Triton implementation if it covers these tensors, else None."""
    if x.q.dtype not in _KERNEL_DTYPES or out_dtype not in _KERNEL_DTYPES:
        return None
    given = [(n, t) for n, t in zip(TENSORS, x.tensors, strict=True) if t is not None]
    if any(t.numel() == 0 for _, t in given) or not _have_numbers_at_zero(x):
        return None
    for name, t in given:
        if name != "key_weight" and t.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"bla::linear_attention: argument '{name}' has a head dim of {t.shape[-1]}, "
                f"expected at most {MAX_HEAD_DIM}, the limit of the CUDA kernels. Use more heads, "
                "or keep the plain formula."
            )
    try:
        from bla_inductor import kernels
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return kernels


# Calls that Triton did not compile: it would try again, for seconds, on every one.
_uncompiled: set[tuple[Any, ...]] = set()


def _compiled_or(
    otherwise: Callable[[], Any], run: Callable[[], Any], key: Callable[[], tuple[Any, ...]]
) -> Any:
    """run(), or otherwise() where Triton cannot compile what it launches; key(): which kernels."""
    if _uncompiled and key() in _uncompiled:
        return otherwise()
    try:
        return run()
    except Exception as error:
        if not _of_compilation(error):
            raise
        _uncompiled.add(key())
        failures.warn_once(log, "ATen computes this attention, more slowly", error)
        return otherwise()


def _of_compilation(error: Exception) -> bool:
    """Whether Triton or ptxas refused a kernel, or the GPU has too little for it."""
    return type(error).__module__.startswith("triton.") or "PassManager" in str(error)


def _key(x: Inputs, dtype: torch.dtype, *more: Any) -> tuple[Any, ...]:
    dims = [None if t is None else t.shape[-1] for t in x.tensors[:5]]
    weight = None if x.key_weight is None else x.key_weight.dtype
    return (x.q.device, x.q.dtype, dtype, *dims, weight, x.normalizer, x.upcast, *x.maps, *more)


def _forward_cuda(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = Inputs(*args, **kwargs)
    check_arguments(x)
    dtype = x.out_dtype or x.q.dtype
    kernels = _kernels(x, dtype)
    if kernels is None:
        return _run_aten(x, keep_state=True)  # type: ignore[return-value]

    def run() -> tuple[Tensor, Tensor, Tensor]:
        sizes = [*query_batch(x.tensors), x.q.shape[-2], x.v.shape[-1]]
        out = empty_dense(x.q, sizes, dtype, x.out_order)
        batch = key_batch(x.k, x.v, x.k_norm, x.key_weight)
        state, key_sum = kernels.forward(out, *x.tensors, batch, x.maps, *x.numbers, x.upcast)
        return out, state, key_sum

    return _compiled_or(lambda: _run_aten(x, keep_state=True), run, lambda: _key(x, dtype))


def _attention_cuda(*args: Any, **kwargs: Any) -> Tensor:
    return _forward_cuda(*args, **kwargs)[0]


def _backward_cuda(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = gradients(*args, **kwargs)
    x = call.inputs
    kernels = _kernels(x, call.do.dtype)
    if kernels is None:
        return _run_backward_aten(call)

    def run() -> tuple[Tensor, ...]:
        grads = [
            empty_dense(t, t.shape, t.dtype, call.order(i)) if t is not None and need else None
            for i, (t, need) in enumerate(zip(x.tensors, call.needs, strict=True))
        ]
        kernels.backward(
            grads, call.do, *x.tensors, call.state, call.key_sum, x.maps, *x.numbers, x.upcast
        )
        return tuple(x.q.new_empty(0) if g is None else g for g in grads)

    return _compiled_or(
        lambda: _run_backward_aten(call), run, lambda: _key(x, call.do.dtype, *call.needs)
    )


def gradient_orders(tensors: Sequence[Tensor | None]) -> list[int]:
    """The `orders` argument: each gradient is laid out like its input, where that is dense."""
    rank = next(t.dim() for t in tensors if t is not None)
    identity = list(range(rank))
    return [d for t in tensors for d in (identity if t is None else dense_order(t))]


lib.impl("linear_attention", _attention_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention_forward", _forward_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention_backward", _backward_aten, "CompositeExplicitAutograd")
lib.impl("linear_attention", _attention_cuda, "CUDA")
lib.impl("linear_attention_forward", _forward_cuda, "CUDA")
lib.impl("linear_attention_backward", _backward_cuda, "CUDA")
