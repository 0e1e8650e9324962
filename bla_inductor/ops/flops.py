"""FLOP formulas for `torch.utils.flop_counter`: two per product, products of the linear association
only.

Counted: state, read-out and z forward; t, dstate, dk, dv (those that are needed) backward.

torch's flop counter imports Triton, so this package does not import it: the formulas are registered
when the package finds it loaded, at import or at the first call that autograd sees.
"""

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from bla_inductor.ops import schema  # noqa: F401  (the operators must exist before their formulas)
from bla_inductor.ops.layout import broadcast

Shape = Sequence[int]
registered = False


def register_if_loaded() -> None:
    """Register the formulas, once, if `torch.utils.flop_counter` is loaded."""
    global registered
    if registered or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils.flop_counter import register_flop_formula

    bla = torch.ops.bla
    register_flop_formula([bla.linear_attention, bla.linear_attention_forward])(forward_flops)
    register_flop_formula(bla.linear_attention_backward)(backward_flops)
    registered = True


def forward_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    q_norm: Shape | None = None,
    k_norm: Shape | None = None,
    key_weight: Shape | None = None,
    *,
    normalizer: str = "none",
    **_: Any,
) -> int:
    """Products with (N + M)·D·Dv a head, and N·D' for z."""
    weights = () if key_weight is None else (key_weight[:-1],)
    norms = (s[:-2] for s in (q_norm, k_norm) if s is not None)
    queries = prod(broadcast((q[:-2], k[:-2], v[:-2], *norms, *weights))) * q[-2]
    keys = prod(broadcast((k[:-2], v[:-2], *weights))) * k[-2]
    flops = 2 * (queries + keys) * k[-1] * v[-1]
    if normalizer != "none":
        flops += 2 * queries * (k if k_norm is None else k_norm)[-1]
    return flops


def backward_flops(
    do: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    q_norm: Shape | None,
    k_norm: Shape | None,
    key_weight: Shape | None,
    state: Shape,
    key_sum: Shape,
    *,
    normalizer: str = "none",
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """N·D·Dv for t and for dstate, M·D·Dv for v·dstateᵀ and for dv, each if needed."""
    weights = () if key_weight is None else (key_weight[:-1],)
    queries = prod(do[:-1])
    keys = prod(broadcast((k[:-2], v[:-2], *weights))) * k[-2]
    needs_t = needs[0] or (normalizer != "none" and any((needs[1], *needs[3:])))
    needs_u = needs[1] or needs[5]
    needs_dstate = needs_u or needs[2]
    flops = 2 * k[-1] * v[-1] * ((needs_t + needs_dstate) * queries + (needs_u + needs[2]) * keys)
    if normalizer != "none":
        flops += 2 * queries * key_sum[-1]
    return flops


register_if_loaded()
