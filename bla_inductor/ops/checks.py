"""Argument checks of `bla::linear_attention`, for real and fake tensors alike.

On symbolic sizes only a mismatch that is known for certain is an error here, so that no guard is
installed; the same checks run again on the real sizes. ValueError for shapes, devices and options,
TypeError for dtypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bla_inductor.ops.layout import known

NAMES = ("q", "k", "v", "q_norm", "k_norm")
NORMALIZERS = ("none", "add", "clamp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OP = "bla::linear_attention"


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    normalizer: str,
    out_dtype: torch.dtype | None,
    out_order: Sequence[int] | None,
) -> None:
    """Raise an error that names the argument, what it is, what it should be, and what to do."""
    tensors = [
        (n, t) for n, t in zip(NAMES, (q, k, v, q_norm, k_norm), strict=True) if t is not None
    ]
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f"{_OP}: argument 'normalizer' is {normalizer!r}, expected one of "
            f"{', '.join(map(repr, NORMALIZERS))}."
        )
    if normalizer == "none" and len(tensors) != 3:
        raise ValueError(
            f"{_OP}: argument '{tensors[3][0]}' is given, but normalizer='none' divides by "
            "nothing. "
            "Leave it out, or choose normalizer='add' or 'clamp'."
        )
    if q.dim() < 2:
        raise ValueError(
            f"{_OP}: argument 'q' has shape {_shape(q)}, expected at least 2 dims (*batch, N, D)."
        )
    dtype, device, rank = q.dtype, q.device, q.dim()
    if dtype not in DTYPES:
        raise TypeError(
            f"{_OP}: argument 'q' has dtype {dtype}, expected one of "
            f"{', '.join(map(str, DTYPES))}. Cast it first."
        )
    for name, t in tensors:
        if t.dtype != dtype:
            raise TypeError(
                f"{_OP}: argument '{name}' has dtype {t.dtype}, expected {dtype}, the dtype "
                "of 'q'. "
                f"Cast it with {name}.to({dtype})."
            )
        if t.device != device:
            raise ValueError(
                f"{_OP}: argument '{name}' is on {t.device}, expected {device}, the device of 'q'. "
                f"Move it with {name}.to('{device}')."
            )
        if t.dim() != rank:
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {_shape(t)}, expected {rank} dims, as "
                "many as 'q' "
                f"{_shape(q)}. Give it batch dims of size 1; they are broadcast."
            )
    key_feature = k if k_norm is None else k_norm
    _same_size("k", k, -1, "q", q)
    _same_size("v", v, -2, "k", k)
    if q_norm is not None:
        _same_size("q_norm", q_norm, -2, "q", q)
        _same_size("q_norm", q_norm, -1, "k" if k_norm is None else "k_norm", key_feature)
    if k_norm is not None:
        _same_size("k_norm", k_norm, -2, "k", k)
        if q_norm is None:
            _same_size("k_norm", k_norm, -1, "q", q)
    for dim in range(rank - 2):
        _check_batch(dim, tensors)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(
            f"{_OP}: argument 'out_dtype' is {out_dtype}, expected one of "
            f"{', '.join(map(str, DTYPES))}."
        )
    if out_order is not None and sorted(out_order) != list(range(rank)):
        raise ValueError(
            f"{_OP}: argument 'out_order' is {list(out_order)}, expected a permutation of "
            f"{list(range(rank))}: the result's dims from outermost to innermost in memory."
        )


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _same_size(name: str, t: Tensor, dim: int, other_name: str, other: Tensor) -> None:
    if known(t.shape[dim] != other.shape[dim]):
        raise ValueError(
            f"{_OP}: argument '{name}' has shape {_shape(t)}, expected size "
            f"{other.shape[dim]} in dim {dim}, "
            f"as '{other_name}' {_shape(other)} has. "
            "Shapes: q (*batch, N, D), k (*batch, M, D), v (*batch, M, Dv), "
            "q_norm (*batch, N, D'), k_norm (*batch, M, D')."
        )


def _check_batch(dim: int, tensors: Sequence[tuple[str, Tensor]]) -> None:
    first: tuple[str, Tensor] | None = None
    for name, t in tensors:
        if known(t.shape[dim] == 1):
            continue
        if first is None:
            first = (name, t)
        elif known(t.shape[dim] != first[1].shape[dim]):
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {_shape(t)}, expected size "
                f"{first[1].shape[dim]} or 1 in "
                f"batch dim {dim}, as '{first[0]}' {_shape(first[1])} has. Repeat it, or "
                "give it size 1."
            )
