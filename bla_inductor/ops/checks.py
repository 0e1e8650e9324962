"""Argument checks of `bla::linear_attention`, for real and fake tensors alike.

On symbolic sizes only a mismatch that is known for certain is an error here, so that no guard is
installed; the same checks run again on the real sizes. ValueError for shapes, devices and options,
TypeError for dtypes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bla_inductor.ops.feature_map import parse
from bla_inductor.ops.layout import known
from bla_inductor.ops.schema import TENSORS, Inputs

NORMALIZERS = ("none", "add", "clamp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OP = "bla::linear_attention"


def check_arguments(x: Inputs) -> None:
    """Raise an error that names the argument, what it is, what it should be, and what to do."""
    q, k, v, q_norm, k_norm, key_weight = x.q, x.k, x.v, x.q_norm, x.k_norm, x.key_weight
    matrices = [(n, t) for n, t in zip(TENSORS[:5], x.tensors, strict=False) if t is not None]
    if x.normalizer not in NORMALIZERS:
        raise ValueError(
            f"{_OP}: argument 'normalizer' is {x.normalizer!r}, expected one of "
            f"{', '.join(map(repr, NORMALIZERS))}."
        )
    if not x.normalized and len(matrices) != 3:
        raise ValueError(
            f"{_OP}: argument '{matrices[3][0]}' is given, but normalizer='none' divides by "
            "nothing. Leave it out, or choose normalizer='add' or 'clamp'."
        )
    if any(x.maps):
        _check_maps(x)
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
    for name, t in matrices:
        if t.dtype != dtype:
            raise TypeError(
                f"{_OP}: argument '{name}' has dtype {t.dtype}, expected {dtype}, the dtype "
                f"of 'q'. Cast it with {name}.to({dtype})."
            )
        _check_device(name, t, device)
        if t.dim() != rank:
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {_shape(t)}, expected {rank} dims, as "
                f"many as 'q' {_shape(q)}. Give it batch dims of size 1; they are broadcast."
            )
    _same_size("k", k, -1, "q", q)
    _same_size("v", v, -2, "k", k)
    if q_norm is not None:
        _same_size("q_norm", q_norm, -2, "q", q)
        _same_size("q_norm", q_norm, -1, "k" if k_norm is None else "k_norm", x.key_norm)
    if k_norm is not None:
        _same_size("k_norm", k_norm, -2, "k", k)
        if q_norm is None:
            _same_size("k_norm", k_norm, -1, "q", q)
    batches = [(name, t, t.shape[:-2]) for name, t in matrices]
    if key_weight is not None:
        _check_key_weight(key_weight, k, device)
        batches.append(("key_weight", key_weight, key_weight.shape[:-1]))
    for dim in range(rank - 2):
        _check_batch(dim, batches)
    if x.out_dtype is not None and x.out_dtype not in DTYPES:
        raise TypeError(
            f"{_OP}: argument 'out_dtype' is {x.out_dtype}, expected one of "
            f"{', '.join(map(str, DTYPES))}."
        )
    if x.out_order is not None and sorted(x.out_order) != list(range(rank)):
        raise ValueError(
            f"{_OP}: argument 'out_order' is {list(x.out_order)}, expected a permutation of "
            f"{list(range(rank))}: the result's dims from outermost to innermost in memory."
        )


def _check_maps(x: Inputs) -> None:
    sources = {"q": x.q, "k": x.k, "q_norm": x.q_norm, "k_norm": x.k_norm}
    for (name, source), text in zip(sources.items(), x.maps, strict=True):
        if not text:
            continue
        if source is None:
            raise ValueError(
                f"{_OP}: argument '{name}_map' is {text!r}, but there is no '{name}' to map. "
                f"Give {name}={name[0]}, or leave the map out: the normaliser then has the "
                f"features of '{name[0]}'."
            )
        try:
            parse(text)
        except ValueError as error:
            raise ValueError(f"{_OP}: argument '{name}_map' is {text!r}: {error}") from None


def _check_key_weight(weight: Tensor, k: Tensor, device: torch.device) -> None:
    if weight.dtype not in (torch.bool, *DTYPES):
        raise TypeError(
            f"{_OP}: argument 'key_weight' has dtype {weight.dtype}, expected torch.bool or one of "
            f"{', '.join(map(str, DTYPES))}. Cast it first."
        )
    _check_device("key_weight", weight, device)
    if weight.dim() != k.dim() - 1:
        raise ValueError(
            f"{_OP}: argument 'key_weight' has shape {_shape(weight)}, expected {k.dim() - 1} dims "
            f"(*batch, M), one less than 'k' {_shape(k)}. Give it batch dims of size 1; they are "
            "broadcast."
        )
    if known(weight.shape[-1] != k.shape[-2]):
        raise ValueError(
            f"{_OP}: argument 'key_weight' has shape {_shape(weight)}, expected size "
            f"{k.shape[-2]} in its last dim, one weight for each key of 'k' {_shape(k)}."
        )


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(
            f"{_OP}: argument '{name}' is on {t.device}, expected {device}, the device of 'q'. "
            f"Move it with {name}.to('{device}')."
        )


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _same_size(name: str, t: Tensor, dim: int, other_name: str, other: Tensor) -> None:
    if known(t.shape[dim] != other.shape[dim]):
        raise ValueError(
            f"{_OP}: argument '{name}' has shape {_shape(t)}, expected size "
            f"{other.shape[dim]} in dim {dim}, as '{other_name}' {_shape(other)} has. "
            "Shapes: q (*batch, N, D), k (*batch, M, D), v (*batch, M, Dv), "
            "q_norm (*batch, N, D'), k_norm (*batch, M, D')."
        )


def _check_batch(dim: int, batches: Sequence[tuple[str, Tensor, Sequence[int]]]) -> None:
    first: tuple[str, Tensor, Sequence[int]] | None = None
    for name, t, batch in batches:
        if known(batch[dim] == 1):
            continue
        if first is None:
            first = (name, t, batch)
        elif known(batch[dim] != first[2][dim]):
            raise ValueError(
                f"{_OP}: argument '{name}' has shape {_shape(t)}, expected size "
                f"{first[2][dim]} or 1 in batch dim {dim}, as '{first[0]}' {_shape(first[1])} "
                "has. Repeat it, or give it size 1."
            )
