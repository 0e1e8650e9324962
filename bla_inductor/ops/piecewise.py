"""`torch.ops.bla.piecewise_sparse_attention`: softmax attention, approximated.

PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers, arXiv 2602.01077.
Queries and keys are cut into blocks of b rows. With block means q̄_i, k̄_j, block sums v̂_j = Σ v,
block lengths len_j, T keys, and H = Σ_j Σ_(m in j) (k_m - k̄_j)ᵀ v_m, each query block i selects the
⌊density · blocks⌋ key blocks (at least one) of the largest q̄_i·k̄_j. For a query q of block i, with
sums over m in the selected blocks and over j not selected:

    out = ( Σ_m e^(s q·k_m) v_m + Σ_j e^(s q·k̄_j) v̂_j + s (Σ_j len_j e^(s q·k̄_j) / T) · q H )
          ÷ ( Σ_m e^(s q·k_m) + Σ_j len_j e^(s q·k̄_j) )

With density=1.0 that is softmax attention. Shapes: q (*batch, N, D), k (*batch, M, D), v (*batch,
M, Dv), one rank, batch dims equal or 1; the result (*batch, N, Dv) has q's dtype (bfloat16,
float16, float32, float64) and is dense in memory with its dims in `out_order`, outermost first.
scale defaults to D**-0.5 and is positive. N and M need not be multiples of block_size.

Inputs that require gradients are a RuntimeError: nothing here is the gradient of softmax attention.
With approximate_training=True the backward is that of the formula above, the selection held
constant; it has no second derivative. A tangent of forward mode is a RuntimeError. Wrong shapes,
devices and numbers are ValueError, dtypes TypeError.

On CUDA, bfloat16 and float16 run in Triton, with D and Dv up to 256 and block_size 16, 32, 64 or
128 (ValueError beyond); float32 and float64 run in ATen there, as everything does on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bla_inductor.ops import forward_mode, piecewise_aten
from bla_inductor.ops.aten import dense, without_autocast
from bla_inductor.ops.layout import broadcast, empty_dense, known
from bla_inductor.ops.schema import lib

__all__ = ["piecewise_sparse_attention"]

MAX_HEAD_DIM = 256
KERNEL_BLOCKS = (16, 32, 64, 128)
_OP = "bla::piecewise_sparse_attention"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_NUMBERS = "float density, int block_size, Scalar? scale=None"

lib.define(
    f"piecewise_sparse_attention(Tensor q, Tensor k, Tensor v, *, {_NUMBERS}, "
    "bool approximate_training=False, int[]? out_order=None) -> Tensor",
    tags=_TAGS,
)
# `chosen` (*batch, query blocks, key blocks) is the selection, of bool.
lib.define(
    f"piecewise_sparse_attention_forward(Tensor q, Tensor k, Tensor v, *, {_NUMBERS}, "
    "int[]? out_order=None) -> (Tensor out, Tensor chosen)",
    tags=_TAGS,
)
lib.define(
    "piecewise_sparse_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor chosen, "
    "*, int block_size, Scalar? scale=None) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)

piecewise_sparse_attention = torch.ops.bla.piecewise_sparse_attention.default
_forward = torch.ops.bla.piecewise_sparse_attention_forward.default
_backward = torch.ops.bla.piecewise_sparse_attention_backward.default


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: float,
    block_size: int,
    scale: Any,
    out_order: Sequence[int] | None,
) -> None:
    tensors = {"q": q, "k": k, "v": v}
    for name, t in tensors.items():
        if t.dim() != q.dim() or t.dim() < 2:
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {tuple(t.shape)}, expected (*batch, rows, "
                f"columns) of one rank, as 'q' {tuple(q.shape)}. Batch dims may be 1."
            )
        if t.dtype != q.dtype or t.dtype not in _DTYPES:
            raise TypeError(
                f"{_OP}: argument '{name}' has dtype {t.dtype}, expected the one floating-point "
                f"dtype of q, k and v (bfloat16, float16, float32, float64). Cast it first."
            )
        if t.device != q.device:
            raise ValueError(
                f"{_OP}: argument '{name}' is on {t.device}, expected {q.device}, as 'q'."
            )
    for name, t, dim, other in (("k", k, -1, "q"), ("v", v, -2, "k")):
        if known(t.shape[dim] != tensors[other].shape[dim]):
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {tuple(t.shape)}, expected size "
                f"{tensors[other].shape[dim]} in dim {dim}, as '{other}' has."
            )
    batch = broadcast(t.shape[:-2] for t in tensors.values())
    for name, t in tensors.items():
        for dim, size in enumerate(batch):
            if known(t.shape[dim] != size) and known(t.shape[dim] != 1):
                raise ValueError(
                    f"{_OP}: argument '{name}' has shape {tuple(t.shape)}, expected {size} or 1 "
                    f"in batch dim {dim}."
                )
    if any(known(k.shape[dim] == 0) for dim in (-2, -1)):
        raise ValueError(f"{_OP}: argument 'k' has shape {tuple(k.shape)}: there is no key.")
    if not 0 < density <= 1:
        raise ValueError(f"{_OP}: density={density} should be above 0 and at most 1.")
    if block_size < 1:
        raise ValueError(f"{_OP}: block_size={block_size} should be positive.")
    if isinstance(scale, int | float) and not (isfinite(scale) and scale > 0):
        raise ValueError(f"{_OP}: scale={scale} should be positive and finite.")
    if out_order is not None and sorted(out_order) != list(range(q.dim())):
        raise ValueError(
            f"{_OP}: out_order={list(out_order)} should be a permutation of {list(range(q.dim()))}."
        )


def _scale(scale: Any, q: Tensor) -> Any:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _result(q: Tensor, k: Tensor, v: Tensor, out_order: Sequence[int] | None) -> Tensor:
    batch = broadcast(t.shape[:-2] for t in (q, k, v))
    return empty_dense(q, [*batch, q.shape[-2], v.shape[-1]], q.dtype, out_order)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float,
    block_size: int,
    scale: Any = None,
    out_order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, density, block_size, scale, out_order)
    blocks = [-(-t.shape[-2] // block_size) for t in (q, k)]
    batch = broadcast(t.shape[:-2] for t in (q, k, v))
    chosen = q.new_empty([*batch, *blocks], dtype=torch.bool)
    return _result(q, k, v, out_order), chosen


def _forward_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float,
    block_size: int,
    scale: Any = None,
    out_order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, density, block_size, scale, out_order)
    scale = float(_scale(scale, q))
    batch = broadcast(t.shape[:-2] for t in (q, k, v))
    with without_autocast(q.device.type):
        chosen = piecewise_aten.select(q, k, density, block_size, scale)
        chosen = chosen.expand(*batch, *chosen.shape[-2:]).contiguous()
        result = _result(q, k, v, out_order)
        if result.numel() == 0:
            return result, chosen
        out = piecewise_aten.forward(q, k, v, chosen, block_size, scale)
    return dense(out, q.dtype, out_order), chosen


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float,
    block_size: int,
    scale: Any = None,
    out_order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, density, block_size, scale, out_order)
    kernels = _kernels(q, v, block_size)
    if kernels is None:
        return _forward_aten(
            q, k, v, density=density, block_size=block_size, scale=scale, out_order=out_order
        )
    out = _result(q, k, v, out_order)
    count = piecewise_aten.chosen_count(density, -(-k.shape[-2] // block_size))
    chosen = kernels.forward(out, q, k, v, count, block_size, float(_scale(scale, q)))
    return out, chosen


def _kernels(q: Tensor, v: Tensor, block_size: int) -> ModuleType | None:
    """The Triton implementation if it covers this problem, else None."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.numel() == 0 or v.numel() == 0:
        return None
    if q.shape[-1] != v.shape[-1]:  # on an H100, Dv = 32 beside D = 128 read outside of a tensor
        return None
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        raise ValueError(
            f"{_OP}: a head dim of {widest}, expected at most {MAX_HEAD_DIM}, the limit of the "
            "CUDA kernels. Use more heads, or keep the exact attention."
        )
    if block_size not in KERNEL_BLOCKS:
        raise ValueError(
            f"{_OP}: block_size={block_size}, expected one of {KERNEL_BLOCKS}, which the CUDA "
            "kernels are written for."
        )
    try:
        from bla_inductor.kernels import piecewise
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return piecewise


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, *, approximate_training: bool = False, **numbers: Any
) -> Tensor:
    return _forward_fake(q, k, v, **numbers)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, approximate_training: bool = False, **numbers: Any
) -> Tensor:
    return _forward(q, k, v, **numbers)[0]


def _attention_autograd(
    q: Tensor, k: Tensor, v: Tensor, *, approximate_training: bool = False, **numbers: Any
) -> Tensor:
    if forward_mode.carried((q, k, v)):
        raise RuntimeError(
            f"{_OP}: an input carries a tangent, and there is no forward-mode derivative here. "
            "Compute the exact attention for it, without the option 'approximate'."
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        if not approximate_training:
            raise RuntimeError(
                f"{_OP}: an input requires a gradient, and there is none that is the gradient of "
                "softmax attention. Run under torch.no_grad(), or ask for the gradient of the "
                "approximation with approximate_training=True."
            )
        return _forward(q, k, v, **numbers)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return piecewise_sparse_attention(q, k, v, **numbers)


def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _backward_aten(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    block_size: int,
    scale: Any = None,
) -> tuple[Tensor, ...]:
    if do.numel() == 0:
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    with without_autocast(q.device.type):
        number = float(_scale(scale, q))
        grads = piecewise_aten.backward(do, q, k, v, chosen, block_size, number)
    return tuple(dense(g, t.dtype, None) for g, t in zip(grads, (q, k, v), strict=True))


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    q, k, v, *_ = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.block_size, ctx.scale = keyword_only_inputs["block_size"], keyword_only_inputs["scale"]


def _differentiate(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _backward(do, *ctx.saved_tensors, block_size=ctx.block_size, scale=ctx.scale)


def _no_second(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
    raise RuntimeError(
        f"{_OP}: a second derivative was asked for, and the approximation has none. Compute the "
        "exact attention for it, without the option 'approximate'."
    )


torch.library.register_fake("bla::piecewise_sparse_attention", _attention_fake, lib=lib)
torch.library.register_fake("bla::piecewise_sparse_attention_forward", _forward_fake, lib=lib)
torch.library.register_fake("bla::piecewise_sparse_attention_backward", _backward_fake, lib=lib)
torch.library.register_autograd(
    "bla::piecewise_sparse_attention_forward", _differentiate, setup_context=_setup, lib=lib
)
torch.library.register_autograd("bla::piecewise_sparse_attention_backward", _no_second, lib=lib)
lib.impl("piecewise_sparse_attention", _attention_autograd, "Autograd")
lib.impl("piecewise_sparse_attention", _attention, "CompositeExplicitAutograd")
lib.impl("piecewise_sparse_attention_forward", _forward_aten, "CompositeExplicitAutograd")
lib.impl("piecewise_sparse_attention_forward", _forward_cuda, "CUDA")
lib.impl("piecewise_sparse_attention_backward", _backward_aten, "CompositeExplicitAutograd")
