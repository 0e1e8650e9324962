"""`bla::piecewise_sparse_attention` on the CPU: the formula, the selection, what it approximates,
its backward, and what it refuses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from piecewise_formula import assert_within_budget, error, exact, plain, selection

from benchmarks.pisa_quality import INPUTS, errors
from bla_inductor.ops import piecewise_aten

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
attention = torch.ops.bla.piecewise_sparse_attention


def draw(n, m, d, dv, dtype=fp64, batch=(2, 3)):
    shapes = ((n, d), (m, d), (m, dv))
    return [torch.randn(*batch, *s, dtype=fp64).to(dtype) for s in shapes]


@pytest.mark.parametrize(("n", "m", "block_size"), [(70, 70, 16), (33, 100, 64), (130, 48, 16)])
@pytest.mark.parametrize("d", [32, 72, 256])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
def test_a_density_of_one_is_softmax_attention(n, m, block_size, d, dtype):
    q, k, v = draw(n, m, d, d, dtype)
    ours = attention(q, k, v, density=1.0, block_size=block_size)
    truth = exact(q.double(), k.double(), v.double(), d**-0.5)
    assert_within_budget(ours, exact(q, k, v, d**-0.5), truth)


@pytest.mark.parametrize(
    ("n", "m", "d", "dv", "block_size", "density"),
    [(64, 64, 16, 16, 16, 0.5), (70, 90, 8, 24, 16, 0.34), (16, 330, 40, 40, 32, 0.01)],
)
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32, fp64])
def test_formula(n, m, d, dv, block_size, density, dtype):
    q, k, v = draw(n, m, d, dv, dtype)
    ours = attention(q, k, v, density=density, block_size=block_size, scale=0.3)
    count = max(1, int(density * -(-m // block_size)))
    wide = [x.double() for x in (q, k, v)]
    chosen = selection(*wide[:2], count, block_size)
    truth = plain(*wide, chosen, block_size, 0.3)
    if dtype == fp64:  # the truth itself: only the order of summation differs
        assert error(ours, truth) < 1e-14
        return
    assert_within_budget(ours, plain(q, k, v, chosen, block_size, 0.3), truth)


def test_steps_of_few_query_blocks(monkeypatch):
    """Long sequences are gone through in steps; here one query block is one."""
    q, k, v = draw(80, 100, 16, 24)
    whole = attention(q, k, v, density=0.4, block_size=16)
    monkeypatch.setitem(piecewise_aten._STEP, "cpu", 1)
    torch.testing.assert_close(attention(q, k, v, density=0.4, block_size=16), whole)


def test_of_equal_scores_the_earlier_blocks_are_selected():
    q, k = torch.ones(1, 40, 8), torch.ones(1, 100, 8)
    chosen = piecewise_aten.select(q, k, 0.5, 16, 1.0)
    assert chosen.shape == (1, 3, 7)
    assert chosen.tolist() == [[[True] * 3 + [False] * 4] * 3]


@pytest.mark.parametrize(
    ("density", "blocks", "count"), [(0.15, 64, 9), (0.01, 64, 1), (0.29, 100, 29), (1.0, 7, 7)]
)
def test_how_many_blocks_are_selected(density, blocks, count):
    assert piecewise_aten.chosen_count(density, blocks) == count


@pytest.mark.parametrize("kind", ["random", "low rank", "clustered"])
@pytest.mark.parametrize("density", [0.1, 0.25])
def test_better_than_dropping_the_other_blocks(kind, density):
    told = errors(INPUTS[kind](512, 32), density, 32)
    assert told["first order"] < 0.7 * told["block-sparse"], told


def test_one_key_repeated_is_exact_at_any_density():
    """Where every block is its mean, the zeroth order is the whole sum."""
    q, k, v = draw(48, 96, 8, 8)
    k = k[..., ::16, :].repeat_interleave(16, -2)
    ours = attention(q, k, v, density=0.17, block_size=16)
    assert error(ours, exact(q, k, v, 8**-0.5)) < 1e-12


@pytest.mark.parametrize(("n", "m", "block_size"), [(32, 64, 16), (21, 50, 16)])
@pytest.mark.parametrize("broadcast", [False, True])
def test_gradients_of_the_selected_structure(n, m, block_size, broadcast):
    q, k, v = draw(n, m, 6, 5)
    k = k[:, :1].clone() if broadcast else k
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def function(*tensors):
        numbers = {"density": 0.3, "block_size": block_size, "scale": 0.4}
        return attention(*tensors, **numbers, approximate_training=True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_gradients_are_no_less_accurate_than_autograds(dtype):
    leaves = [x.requires_grad_() for x in draw(40, 90, 16, 8, dtype)]
    ours = attention(*leaves, density=0.4, block_size=16, approximate_training=True)
    do = torch.randn_like(ours)
    got = torch.autograd.grad(ours, leaves, do)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    chosen = selection(*wide[:2], 2, 16)
    eager = torch.autograd.grad(plain(*leaves, chosen, 16, 0.25), leaves, do)
    truth = torch.autograd.grad(plain(*wide, chosen, 16, 0.25), wide, do.double())
    for mine, theirs, right in zip(got, eager, truth, strict=True):
        assert_within_budget(mine, theirs, right)


def test_without_approximate_training_gradients_are_an_error():
    q, k, v = draw(32, 32, 8, 8, fp32)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="approximate_training=True"):
        attention(q, k, v, density=0.5, block_size=16)
    with torch.no_grad():
        assert not attention(q, k, v, density=0.5, block_size=16).requires_grad


def test_result_in_another_memory_order():
    q, k, v = draw(40, 60, 8, 12, fp32)
    numbers = {"density": 0.5, "block_size": 16}
    ours = attention(q, k, v, **numbers, out_order=[0, 2, 1, 3])
    assert ours.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(ours, attention(q, k, v, **numbers))


def test_autocast_changes_nothing():
    q, k, v = draw(40, 60, 8, 8, fp32)
    plainly = attention(q, k, v, density=0.5, block_size=16)
    with torch.autocast("cpu", bf16):
        assert torch.equal(attention(q, k, v, density=0.5, block_size=16), plainly)


@pytest.mark.parametrize("training", [False, True])
def test_registrations(training):
    q, k, v = draw(20, 40, 8, 12, fp32)
    q, k, v = q.transpose(0, 1), k[:1, :1], v[0, 0].expand(3, 2, 40, 12)
    if training:
        q = q.detach().requires_grad_()
    numbers = {"density": 0.5, "block_size": 16, "approximate_training": training}
    torch.library.opcheck(attention.default, (q, k, v), numbers)


@pytest.mark.parametrize(
    ("change", "numbers", "kind", "message"),
    [
        ({"k": (2, 40, 9)}, {}, ValueError, "'k' has shape .* expected size 8 in dim -1, as 'q'"),
        ({"v": (2, 41, 8)}, {}, ValueError, "'v' has shape .* expected size 40 in dim -2, as 'k'"),
        ({"v": (3, 40, 8)}, {}, ValueError, "'v' has shape .* expected 2 or 1 in batch dim 0"),
        ({"v": (40, 8)}, {}, ValueError, "'v' has shape .* of one rank, as 'q'"),
        ({"k": (2, 0, 8), "v": (2, 0, 8)}, {}, ValueError, "there is no key"),
        ({}, {"density": 0.0}, ValueError, "density=0.0 should be above 0 and at most 1"),
        ({}, {"density": 1.5}, ValueError, "density=1.5 should be above 0 and at most 1"),
        ({}, {"block_size": 0}, ValueError, "block_size=0 should be positive"),
        ({}, {"scale": -1.0}, ValueError, "scale=-1.0 should be positive"),
        ({}, {"out_order": [0, 0, 1]}, ValueError, r"out_order=\[0, 0, 1\] should be a perm"),
    ],
)
def test_wrong_arguments(change, numbers, kind, message):
    shapes = {"q": (2, 30, 8), "k": (2, 40, 8), "v": (2, 40, 8)} | change
    tensors = [torch.randn(shape) for shape in shapes.values()]
    with pytest.raises(kind, match=message):
        attention(*tensors, **({"density": 0.5, "block_size": 16} | numbers))


def test_wrong_dtypes():
    q, k, v = draw(20, 20, 8, 8, fp32)
    with pytest.raises(TypeError, match=r"'k' has dtype torch\.float16"):
        attention(q, k.half(), v, density=0.5, block_size=16)
    with pytest.raises(TypeError, match=r"'q' has dtype torch\.int64"):
        attention(q.long(), k.long(), v.long(), density=0.5, block_size=16)


def test_there_is_no_second_derivative():
    leaves = [torch.randn(1, 1, 32, 16, requires_grad=True) for _ in range(3)]
    out = torch.ops.bla.piecewise_sparse_attention(
        *leaves, density=0.5, block_size=16, approximate_training=True
    )
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*without the option 'approximate'"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
