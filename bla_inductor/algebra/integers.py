"""Where integers are computed with: small ones wrap around, so that a product of them is not the
product of the same numbers in floating point.
"""

from __future__ import annotations

import torch

from bla_inductor.algebra.term import Value

__all__ = ["may_have_wrapped"]


def may_have_wrapped(value: Value) -> bool:
    """Whether `value` is of integers shorter than 64 bits and was computed: it is something else in
    another dtype. A product of zeros and ones is not.
    """
    dtype, term = value.dtype, value.term
    if dtype.is_floating_point or dtype.is_complex or dtype.itemsize == 8 or dtype == torch.bool:
        return False
    if term.constant():
        return False
    plain = term.coef == 1 and not term.bound
    few = len(term.factors) == 1 or all(leaf.dtype == torch.bool for leaf in term.leaves())
    return not (plain and few)
