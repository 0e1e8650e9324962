"""The Triton functions of feature maps on a GPU, which has its own exponentials, roots and
quotients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
    from feature_map_cases import (  # noqa: F401  (pytest collects them here)
        run,
        test_constants_fill_the_tile,
        test_digits_near_zero,
        test_elu_plus_one_keeps_its_digits,
        test_identity,
        test_infinity,
        test_nan_goes_through_and_stays_in_its_row,
        test_rows_of_zeros_and_below_eps,
        test_the_operators_cuda_path_hands_everything_to_the_kernels,
        test_value_and_gradient,
        test_where_pieces_meet_and_where_they_overflow,
    )


def test_exp_is_exact_to_its_last_digits_and_overflows_to_infinity() -> None:
    x = torch.linspace(-85, 100, 8 * 16).reshape(8, 16)
    y, _ = run("exp(x)", x, x)
    torch.testing.assert_close(y, x.double().exp().float(), rtol=4e-7, atol=0)
