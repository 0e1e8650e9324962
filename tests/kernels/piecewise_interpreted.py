"""The kernels of piecewise sparse attention in Triton's interpreter, which must be on before triton
is imported: run by test_piecewise_interpreted.py in a process of its own. fp16 and fp32 only; bf16
products are garbage there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from bla_inductor.kernels import piecewise
from bla_inductor.kernels.piecewise_statistics import select_kernel
from piecewise_formula import assert_within_budget, error, plain, selection

fp16, fp32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Every buffer starts as garbage, so that an element nobody wrote is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan") if made.dtype.is_floating_point else 99)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def draw(n, m, d, dv, dtype, batch=(2,)):
    return [torch.randn(*batch, *s).to(dtype) for s in ((n, d), (m, d), (m, dv))]


def check(tensors, count, block_size, scale=0.2, out=None):
    q, k, v = tensors
    wide = [x.double() for x in tensors]
    expected = selection(*wide[:2], count, block_size)
    truth = plain(*wide, expected, block_size, scale)
    out = torch.full(truth.shape, float("nan"), dtype=q.dtype) if out is None else out
    chosen = piecewise.forward(out, q, k, v, count, block_size, scale)
    assert torch.equal(chosen, expected.expand(chosen.shape))
    assert error(out, truth) < 0.02  # the budget is infinite where the eager formula overflows
    assert_within_budget(out, plain(q, k, v, expected, block_size, scale), truth)
    return out


@pytest.mark.parametrize(
    ("n", "m", "d", "dv", "block_size", "count"),
    [
        (32, 128, 16, 16, 16, 3),
        (50, 200, 24, 40, 16, 2),
        (40, 130, 72, 16, 32, 1),
        (70, 150, 16, 136, 64, 2),
        (130, 300, 32, 32, 128, 1),
        (64, 96, 136, 24, 32, 3),
    ],
)
@pytest.mark.parametrize("dtype", [fp16, fp32])
def test_shapes(n, m, d, dv, block_size, count, dtype):
    check(draw(n, m, d, dv, dtype), count, block_size)


def test_many_blocks_and_splits():
    check(draw(32, 1100, 16, 16, fp32, batch=(1,)), 5, 16)


def test_heads_inside_and_result_alike():
    tensors = [x.transpose(1, 2) for x in draw(3, 3, 16, 16, fp32, batch=(2, 40))]
    out = torch.empty(2, 40, 3, 16).transpose(1, 2)
    check(tensors, 1, 16, out=out)


def test_broadcast_and_unmergeable_batch_dims():
    q, k, v = (
        torch.randn(2, 3, 2, 20, 16),
        torch.randn(1, 3, 1, 50, 16),
        torch.randn(2, 1, 1, 50, 8),
    )
    check([q.transpose(0, 2).contiguous().transpose(0, 2), k, v], 2, 16)


def test_selection_by_bits():
    """Of equal scores the earlier; -0.0 is 0.0; NaN is above infinity, and one is one."""
    inf, nan = float("inf"), float("nan")
    rows = [
        ([1.0, 3.0, 2.0, 3.0, 3.0], 2, [1, 3]),
        ([-0.0, 0.0, -0.0, -1.0, 0.0], 2, [0, 1]),
        ([-4.0, -2.0, -3.0, -1.0, -2.0], 3, [1, 3, 4]),
        ([-inf, 1e-40, -inf, inf, -1e-40], 3, [1, 3, 4]),
        ([-inf] * 5, 2, [0, 1]),
        ([1.0, nan, 2.0, inf, 0.0], 2, [1, 3]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 5, [0, 1, 2, 3, 4]),
    ]
    for scores, count, places in rows:
        chosen = torch.full((1, 5), 99, dtype=torch.uint8)
        picks = torch.full((1, count), 99, dtype=torch.int32)
        select_kernel[(1,)](torch.tensor([scores]), chosen, picks, 5, count, WIDTH=16)
        assert picks[0].tolist() == places
        assert chosen[0].nonzero().flatten().tolist() == places


def test_ties():
    q, k, v = draw(16, 96, 16, 16, fp32, batch=(1,))
    check([q, k * 0, v], 3, 16)


def test_fp16_of_large_magnitude_stays_finite():
    """Σ (k - k̄)ᵀv over the keys is far beyond fp16."""
    q, k, v = draw(16, 512, 16, 16, fp16, batch=(1,))
    check([q / 100, k * 100, v * 1000], 2, 16)
