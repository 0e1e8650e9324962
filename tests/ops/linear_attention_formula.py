"""The formula of `bla::linear_attention` written out, as a user would write it, and error measures
against it.

`plain` is the naive graph in whatever dtype its inputs have; on fp64 inputs it is the oracle. The
operator may have the error of the naive graph in the same dtype, or of the exact result rounded
once, whichever is larger, times FACTOR. In fp32 both are sums of the same terms rounded at every
step, and the order of summation alone moves either by tens of percent; a 16-bit result is rounded
once, after sums that are exact in comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from feature_map_table import PHI
from torch import Tensor

import bla_inductor.ops  # noqa: F401  (registers the operator)

NAMES = ("dq", "dk", "dv", "dq_norm", "dk_norm", "dkey_weight")
MAPS = ("q_map", "k_map", "q_norm_map", "k_norm_map")
_FUNCTIONS = {"": lambda x: x, **dict(PHI.values())}
FACTOR = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 1.5}


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    normalizer: str = "none",
    scale: float = 1.0,
    norm_scale: float = 1.0,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    out_order: Sequence[int] | None = None,
    **maps: str,
) -> Tensor:
    """scale · φ(q) (w φ(k)ᵀ v) / guard(norm_scale · φ(q') Σ w φ(k')), in the inputs' dtype, or in
    `out_dtype` after an upcast. The maps are those of the table, by their text.
    """
    if out_dtype is not None:
        q, k, v = q.to(out_dtype), k.to(out_dtype), v.to(out_dtype)
        q_norm = None if q_norm is None else q_norm.to(out_dtype)
        k_norm = None if k_norm is None else k_norm.to(out_dtype)
    q, k, q_norm, k_norm = (
        None if t is None else _FUNCTIONS[maps.get(name, "")](t)
        for name, t in zip(MAPS, (q, k, q_norm, k_norm), strict=True)
    )
    if key_weight is not None:
        k = k * key_weight.unsqueeze(-1)
        k_norm = None if k_norm is None else k_norm * key_weight.unsqueeze(-1)
    out = q @ (k.transpose(-1, -2) @ v)
    if scale != 1.0:
        out = out * scale
    if normalizer == "none":
        return out
    key_sum = (k if k_norm is None else k_norm).sum(-2)
    z = (q if q_norm is None else q_norm) @ key_sum.unsqueeze(-1)
    if norm_scale != 1.0:
        z = z * norm_scale
    return out / (z + eps if normalizer == "add" else z.clamp(min=eps))


def operator(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.bla.linear_attention.default(*args, **kwargs)


def results(function: Any, tensors: Sequence[Tensor | None], do: Tensor, **kwargs: Any) -> dict:
    """The output and the gradient of every given floating-point tensor, by name."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    out = function(*leaves, **kwargs)
    given = [
        (n, t)
        for n, t in zip(NAMES, leaves, strict=False)
        if t is not None and t.is_floating_point()
    ]
    grads = torch.autograd.grad(out, [t for _, t in given], do.to(out.dtype))
    return {"out": out.detach(), **{n: g for (n, _), g in zip(given, grads, strict=True)}}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖ in fp64; NaN counts as infinite."""
    error = ((x.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


def assert_within_budget(tensors: Sequence[Tensor | None], do: Tensor, **kwargs: Any) -> None:
    """Output and gradients of the operator against the fp64 oracle, next to the naive graph's own
    error.
    """
    ours = results(operator, tensors, do, **kwargs)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    oracle = results(plain, wide, do.double(), **{**kwargs, "out_dtype": None})
    naive = results(plain, tensors, do, **kwargs)
    for name, exact in oracle.items():
        assert ours[name].shape == exact.shape, name
        assert ours[name].dtype == naive[name].dtype, name
        error = relative_error(ours[name], exact)
        rounded = relative_error(exact.to(naive[name].dtype), exact)
        budget = FACTOR[ours[name].dtype] * max(relative_error(naive[name], exact), rounded)
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"


def median_normaliser(tensors: Sequence[Tensor | None], norm_scale: float = 1.0) -> float:
    """The median of z: clamped there, half of the rows are at the bound."""
    q, k, _, q_norm, k_norm = (*tensors, None, None)[:5]
    q, k = q if q_norm is None else q_norm, k if k_norm is None else k_norm
    assert q is not None
    assert k is not None
    z = q.double() @ k.double().sum(-2).unsqueeze(-1) * norm_scale
    return z.median().item()


def positive(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Like φ(q) and φ(k) after relu: a normaliser well away from zero, about half the entries
    zero.
    """
    return torch.randn(shape, device=device).relu().to(dtype)


def heads_inside(
    *shape: int, dtype: torch.dtype, device: str = "cpu", signed: bool = False
) -> Tensor:
    """(B, H, N, D) whose memory is (B, N, H, D): the layout of a qkv projection."""
    b, h, n, d = shape
    x = torch.randn(b, n, h, d, device=device)
    return (x if signed else x.relu()).to(dtype).transpose(1, 2)


def tokens_last(
    *shape: int, dtype: torch.dtype, device: str = "cpu", signed: bool = False
) -> Tensor:
    """(B, H, N, D) whose memory is (B, H, D, N): the layout of a 1×1 convolution."""
    b, h, n, d = shape
    x = torch.randn(b, h, d, n, device=device)
    return (x if signed else x.relu()).to(dtype).transpose(2, 3)
