"""Piecewise sparse attention on a GPU: the kernels against the formula in fp64 for the selection
that they made, the selection against its scores, and the whole path through Inductor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from piecewise_formula import assert_within_budget, error, exact, means, plain

from bla_inductor.ops import piecewise_aten
from tests.counted import counted

pytestmark = pytest.mark.gpu
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
attention = torch.ops.bla.piecewise_sparse_attention
forward = torch.ops.bla.piecewise_sparse_attention_forward


def draw(n, m, d, dv, dtype=bf16, batch=(2, 3)):
    """Views of (B, rows, H, columns), as projections make them; neighbours are alike."""
    made = []
    for rows, columns in ((n, d), (m, d), (m, dv)):
        x = torch.randn(batch[0], rows, *batch[1:], columns, device="cuda")
        made.append((x + x.roll(1, 1) + x.roll(2, 1)).to(dtype).transpose(1, 2))
    return made


def check(tensors, density, block_size, **numbers):
    q, k, v = tensors
    scale = q.shape[-1] ** -0.5
    out, chosen = forward(q, k, v, density=density, block_size=block_size, **numbers)
    wide = [x.double() for x in tensors]
    scores = means(wide[0], block_size) @ means(wide[1], block_size).mT
    scores = scores.expand(chosen.shape)
    count = piecewise_aten.chosen_count(density, chosen.shape[-1])
    assert (chosen.sum(-1) == count).all()
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (worst >= best - 1e-5 * scores.abs().amax()).all()
    truth = plain(*wide, chosen, block_size, scale)
    assert error(out, truth) < 0.02  # the budget is infinite where the eager formula overflows
    assert_within_budget(out, plain(q, k, v, chosen, block_size, scale), truth)
    return out


@pytest.mark.parametrize("d", [32, 40, 64, 72, 96, 128, 160, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_formula(d, block_size, dtype):
    check(draw(500, 1030, d, d, dtype), 0.2, block_size)


@pytest.mark.parametrize(("n", "m"), [(1024, 1024), (1, 640), (4096, 77), (63, 8192), (2048, 2049)])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 32), (24, 136)])
def test_lengths(n, m, d, dv):
    check(draw(n, m, d, dv, batch=(1, 2)), 0.1, 64)


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_density_of_one_is_softmax_attention(d, dtype):
    q, k, v = draw(300, 700, d, d, dtype)
    ours = attention(q, k, v, density=1.0, block_size=64)
    truth = exact(q.double(), k.double(), v.double(), d**-0.5)
    assert_within_budget(ours, exact(q, k, v, d**-0.5), truth)


def test_float32_runs_in_aten():
    q, k, v = draw(300, 700, 64, 64, fp32)
    out, chosen = forward(q, k, v, density=0.2, block_size=64)
    truth = plain(q.double(), k.double(), v.double(), chosen, 64, 0.125)
    assert error(out, truth) < 1e-4


def test_broadcast_heads_and_another_memory_order():
    q, k, v = draw(300, 700, 64, 64)
    check([q, k[:, :1], v[:1]], 0.2, 64)
    out = check([q, k, v], 0.2, 64, out_order=[0, 2, 1, 3])
    assert out.transpose(1, 2).is_contiguous()


def test_large_fp16_inputs_stay_finite():
    q, k, v = draw(256, 4096, 64, 64, fp16, batch=(1, 1))
    check([q / 100, k * 30, v * 1000], 0.1, 64)


def test_bitwise_the_same_from_run_to_run():
    tensors = draw(2048, 4096, 64, 64)
    first = attention(*tensors, density=0.1, block_size=64)
    for _ in range(5):
        assert torch.equal(first, attention(*tensors, density=0.1, block_size=64))


@pytest.mark.parametrize(
    ("d", "block_size", "message"), [(264, 64, "head dim of 264"), (64, 48, "block_size=48")]
)
def test_beyond_the_kernels(d, block_size, message):
    with pytest.raises(ValueError, match=message):
        attention(*draw(128, 128, d, d), density=0.5, block_size=block_size)


@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_gradients(dtype):
    leaves = [x.detach().requires_grad_() for x in draw(200, 500, 32, 32, dtype)]
    numbers = {"density": 0.25, "block_size": 32}
    out = attention(*leaves, **numbers, approximate_training=True)
    do = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, do)
    chosen = forward(*(x.detach() for x in leaves), **numbers)[1]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(plain(*wide, chosen, 32, 32**-0.5), wide, do.double())
    eager = torch.autograd.grad(plain(*leaves, chosen, 32, 32**-0.5), leaves, do)
    for mine, theirs, right in zip(got, eager, truth, strict=True):
        assert_within_budget(mine, theirs, right)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(mode, dynamic):
    def model(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v).transpose(1, 2).flatten(2) + 1

    options = {"approximate": {"pisa": {"density": 0.2, "block_size": 64}}, "mode": mode}
    run = torch.compile(model, backend="bla", options=options, dynamic=dynamic, fullgraph=True)
    for rows in (1024, 1100):
        q, k, v = draw(rows, rows, 64, 64)
        expected = attention(q * 2, k, v, density=0.2, block_size=64).transpose(1, 2).flatten(2) + 1
        for _ in range(3):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                torch.testing.assert_close(run(q, k, v), expected, rtol=2e-2, atol=2e-2)
    assert counted()["matched"] >= 1
