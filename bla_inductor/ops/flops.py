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
    *,
    normalizer: str = "none",
    **_: Any,
) -> int:
    """Products with (N + M)·D·Dv a head, and N·D' for z."""
    queries = prod(broadcast(s[:-2] for s in (q, k, v, q_norm, k_norm) if s is not None)) * q[-2]
    keys = prod(broadcast(s[:-2] for s in (k, v) if s is not None)) * k[-2]
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
    state: Shape,
    key_sum: Shape,
    *,
    normalizer: str,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """N·D·Dv for t and for dstate, M·D·Dv for dk and for dv, each if needed."""
    queries = prod(do[:-1])
    keys = prod(broadcast(s[:-2] for s in (k, v))) * k[-2]
    needs_t = needs[0] or (normalizer != "none" and (needs[1] or needs[3] or needs[4]))
    needs_dstate = needs[1] or needs[2]
    flops = 2 * k[-1] * v[-1] * ((needs_t + needs_dstate) * queries + (needs[1] + needs[2]) * keys)
    if normalizer != "none":
        flops += 2 * queries * key_sum[-1]
    return flops


register_if_loaded()
