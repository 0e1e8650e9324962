"""The operators' schemas in the namespace `bla`, their arguments as Python objects, and the
library that every registration goes through.

`Library.define` rather than `custom_op`: a call costs 1–5 µs instead of 7–18. `flexible_layout`
because the kernels take any strides, so Inductor need not copy inputs into a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

lib = Library("bla", "DEF")

_FORMULA = (
    'str q_map="", str k_map="", str q_norm_map="", str k_norm_map="", str normalizer="none", '
    "Scalar scale=1.0, Scalar norm_scale=1.0, Scalar eps=0.0"
)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_norm=None, Tensor? k_norm=None, "
    f"Tensor? key_weight=None, *, {_FORMULA}, "
    "ScalarType? out_dtype=None, int[]? out_order=None, bool upcast=False"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

lib.define(f"linear_attention({_INPUTS}) -> Tensor", tags=_TAGS)
lib.define(
    f"linear_attention_forward({_INPUTS}) -> (Tensor out, Tensor state, Tensor key_sum)",
    tags=_TAGS,
)
# `orders`: five permutations of the dims, one after the other: the memory orders of dq dk dv
# dq_norm dk_norm (default: contiguous). They are arguments, not read off the inputs' strides, so
# that a fake tensor with symbolic strides and the kernel agree without a guard. A gradient that is
# not needed comes back as (0,).
lib.define(
    "linear_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? q_norm, "
    f"Tensor? k_norm, Tensor? key_weight, Tensor state, Tensor key_sum, *, {_FORMULA}, "
    "bool[6] needs, int[]? orders=None, bool upcast=False) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dq_norm, Tensor dk_norm, Tensor dkey_weight)",
    tags=_TAGS,
)

linear_attention = torch.ops.bla.linear_attention.default
linear_attention_forward = torch.ops.bla.linear_attention_forward.default
linear_attention_backward = torch.ops.bla.linear_attention_backward.default

TENSORS = ("q", "k", "v", "q_norm", "k_norm", "key_weight")
# What the backward has no use for.
RESULT_ONLY = ("out_dtype", "out_order")


@dataclass(slots=True)
class Inputs:
    """The arguments of the forward operators, bound: `Inputs(*args, **kwargs)` as they arrive."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    key_weight: Tensor | None = None
    q_map: str = ""
    k_map: str = ""
    q_norm_map: str = ""
    k_norm_map: str = ""
    normalizer: str = "none"
    scale: float = 1.0
    norm_scale: float = 1.0
    eps: float = 0.0
    out_dtype: torch.dtype | None = None
    out_order: Sequence[int] | None = None
    upcast: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """q, k, v, q_norm, k_norm, key_weight."""
        return self.q, self.k, self.v, self.q_norm, self.k_norm, self.key_weight

    @property
    def maps(self) -> tuple[str, str, str, str]:
        return self.q_map, self.k_map, self.q_norm_map, self.k_norm_map

    @property
    def numbers(self) -> tuple[str, float, float, float]:
        return self.normalizer, self.scale, self.norm_scale, self.eps

    @property
    def normalized(self) -> bool:
        return self.normalizer != "none"

    @property
    def key_norm(self) -> Tensor:
        """The tensor that the keys of the normaliser are made of."""
        return self.k if self.k_norm is None else self.k_norm


@dataclass(slots=True)
class Gradients:
    """The arguments of the backward operator, bound by `gradients(*args, **kwargs)`."""

    do: Tensor
    inputs: Inputs
    state: Tensor
    key_sum: Tensor
    needs: Sequence[bool]
    orders: Sequence[int] | None

    def order(self, i: int) -> Sequence[int] | None:
        """The memory order of the gradient of the i-th tensor."""
        rank = self.inputs.q.dim()
        return self.orders[i * rank : (i + 1) * rank] if self.orders and i < 5 else None


def gradients(
    do: Tensor,
    *args: Any,
    needs: Sequence[bool],
    orders: Sequence[int] | None = None,
    **formula: Any,
) -> Gradients:
    """Bind the arguments of `linear_attention_backward`."""
    *tensors, state, key_sum = args
    return Gradients(do, Inputs(*tensors, **formula), state, key_sum, needs, orders)
