"""Who is measured: the naive formula in eager mode, under Inductor and under bla; SDPA; a peer.

The peer is the hand-written kernel library flash-bidirectional-linear-attention, where it is
installed. SDPA is softmax attention, another function: it says what the quadratic way costs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bla_inductor.bench.cases import Case

__all__ = ["FEATURE_MAPS", "PROVIDERS", "Attention", "naive", "provider"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PROVIDERS = ("torch", "inductor", "bla", "sdpa", "peer")
EPS = 1e-6
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}


def naive(case: Case) -> Attention:
    """The formula as users write it."""
    phi, upcast, normalised = FEATURE_MAPS[case.phi], case.upcast, case.normalised

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = q.dtype
        q, k = phi(q), phi(k)
        if upcast:
            q, k, v = q.float(), k.float(), v.float()
        scale = k.shape[-2] ** -1.0
        out = q @ ((k.transpose(-2, -1) * scale) @ v)
        if normalised:
            out = out / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + EPS)
        return out.to(dtype)

    return attention


def provider(name: str, case: Case) -> Attention | None:
    """The attention of `case` by provider `name`; None where it does not do such a case."""
    if name == "torch":
        return naive(case)
    if name in ("inductor", "bla"):
        torch._dynamo.reset()
        return torch.compile(naive(case), backend=name, dynamic=False, fullgraph=True)
    if name == "sdpa":
        return None if case.dtype == torch.float32 else F.scaled_dot_product_attention
    if name == "peer":
        return _peer(case)
    raise ValueError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")


def _peer(case: Case) -> Attention | None:
    try:
        module = importlib.import_module("flash_bla.ops.linear_attn.fused")
    except ImportError:
        return None
    if not case.normalised or case.upcast or case.keys != case.N:
        return None
    phi, theirs = FEATURE_MAPS[case.phi], module.linear_attention
    return lambda q, k, v: theirs(phi(q), phi(k), v)
