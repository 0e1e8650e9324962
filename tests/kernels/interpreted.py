"""The kernels' arithmetic in Triton's interpreter, which must be on before triton is imported: not
collected as it stands, but run by test_kernels_interpreted.py in a process of its own. fp16 and
fp32 only; bf16 products are garbage there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from bla_inductor.kernels import heuristics
from linear_attention_formula import (
    FACTOR,
    NAMES,
    heads_inside,
    median_normaliser,
    plain,
    relative_error,
    results,
    tokens_last,
)

from bla_inductor import kernels
from bla_inductor.ops.layout import broadcast, key_batch

fp16, fp32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Every buffer starts as NaN, so that an element nobody wrote is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan"))
    )


def check(tensors, do, needs=(True,) * 5, normalizer="add", scale=0.7, norm_scale=0.3, eps=0.125):
    """Forward and backward of the kernels within the naive graph's error; returns what they
    wrote.
    """
    tensors = (*tensors, *(None,) * (5 - len(tensors)))
    q, k, v, _, k_norm = tensors
    numbers = (normalizer, scale, norm_scale, eps)
    out = torch.full_like(do, float("nan"))
    state, key_sum = kernels.forward(out, *tensors, key_batch(k, v, k_norm), *numbers)
    grads = [
        torch.full_like(t, float("nan")) if t is not None and need else None
        for t, need in zip(tensors, needs, strict=True)
    ]
    kernels.backward(grads, do, *tensors, state, key_sum, *numbers)
    ours = {"out": out, **{n: g for n, g in zip(NAMES, grads, strict=True) if g is not None}}
    keywords = {"normalizer": normalizer, "scale": scale}
    if normalizer != "none":
        keywords |= {"norm_scale": norm_scale, "eps": eps}
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(plain, wide, do.double(), **keywords)
    upcast = {} if do.dtype == q.dtype else {"out_dtype": do.dtype}
    naive = results(plain, tensors, do, **keywords, **upcast)
    for name, value in ours.items():
        rounded = relative_error(exact[name].to(value.dtype), exact[name])
        # The interpreter sums one block of rows after the other, a CPU in a tree: up to twice the
        # error in fp32.
        factor = 2.5 if value.dtype == fp32 else FACTOR[value.dtype]
        budget = factor * max(relative_error(naive[name], exact[name]), rounded)
        error = relative_error(value, exact[name])
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"
    return ours


def inputs(n, m, d, dv, dtype, make=heads_inside, h=2):
    q, k = make(1, h, n, d, dtype=dtype), make(1, h, m, d, dtype=dtype)
    v = torch.randn(1, h, m, dv).to(dtype)
    return (q, k, v), torch.randn(1, h, n, dv).to(dtype)


@pytest.mark.parametrize("normalizer", ["none", "add", "clamp"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [fp16, fp32])
def test_normalizers(normalizer, decoupled, dtype):
    tensors, do = inputs(70, 45, 24, 40, dtype)
    if decoupled and normalizer != "none":
        tensors += tuple(heads_inside(1, 2, s, 20, dtype=dtype) for s in (70, 45))
    check(tensors, do, normalizer=normalizer, eps=median_normaliser(tensors, 0.3))


@pytest.mark.parametrize(
    ("d", "dv"), [(8, 8), (24, 72), (72, 24), (112, 112), (136, 24), (24, 136), (256, 16)]
)
@pytest.mark.parametrize("dtype", [fp16, fp32])
def test_head_dims(d, dv, dtype):
    tensors, do = inputs(40, 70, d, dv, dtype)
    check(tensors, do)


@pytest.mark.parametrize("d", [16, 136])
def test_float32_result_of_fp16(d):
    tensors, do = inputs(70, 150, d, 24, fp16)
    check(tensors, do.float())


@pytest.mark.parametrize("make", [heads_inside, tokens_last])
@pytest.mark.parametrize("n", [1, 16, 64, 129])
def test_ragged_lengths_and_layouts(make, n):
    tensors, do = inputs(n, 130 - n, 20, 20, fp32, make)
    check(tensors, do.mT.contiguous().mT)


@pytest.mark.parametrize("d", [16, 136])
@pytest.mark.parametrize("normalizer", ["none", "add"])
def test_splits_of_the_sequence(d, normalizer, monkeypatch):
    seen = []

    def split_in_three(rows, programs, tile, device):
        each = -(-rows // (3 * tile.BLOCK_N)) * tile.BLOCK_N
        seen.append(-(-rows // each))
        return each, -(-rows // each)

    monkeypatch.setattr(heuristics, "divide_rows", split_in_three)
    tensors, do = inputs(200, 180, d, 24, fp16)
    check(tensors, do, normalizer=normalizer)
    assert max(seen) == 3


@pytest.mark.parametrize("d", [16, 136])
@pytest.mark.parametrize("unfused", [False, True])
def test_broadcast_and_unmergeable_batch_dims(d, unfused, monkeypatch):
    if unfused:
        monkeypatch.setattr(heuristics, "fused_query_pass", lambda *_: False)
    shapes = ((2, 3, 2, 20, d), (1, 3, 1, 30, d), (2, 1, 1, 30, 24))
    tensors = tuple(torch.rand(s).half() for s in shapes)
    tensors = (tensors[0].transpose(0, 2).contiguous().transpose(0, 2), *tensors[1:])
    batch = broadcast(t.shape[:-2] for t in tensors)
    check(tensors, torch.randn(*batch, 20, 24).half())


@pytest.mark.parametrize("kind", ["expanded", "slice"])
def test_any_incoming_gradient(kind):
    tensors, _ = inputs(40, 70, 24, 16, fp32)
    do = (
        torch.ones(()).expand(1, 2, 40, 16)
        if kind == "expanded"
        else torch.randn(1, 2, 40, 37)[..., 20:36]
    )
    check(tensors, do)


@pytest.mark.parametrize("d", [16, 136])
@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (1, 3), (0, 1, 2, 3, 4)])
def test_only_the_gradients_that_are_needed(d, unfused, needed, monkeypatch):
    if unfused:
        monkeypatch.setattr(heuristics, "fused_query_pass", lambda *_: False)
    tensors, do = inputs(40, 70, d, 16, fp16)
    tensors += tuple(heads_inside(1, 2, s, 20, dtype=fp16) for s in (40, 70))
    check(tensors, do, needs=[i in needed for i in range(5)])


def test_clamped_rows_of_wide_heads():
    tensors, do = inputs(70, 45, 136, 24, fp32)
    check(tensors, do, normalizer="clamp", eps=median_normaliser(tensors, 0.3))


def test_offsets_in_int64(monkeypatch):
    from bla_inductor.kernels import launch

    monkeypatch.setattr(launch, "_big", lambda *_: True)
    for d in (16, 136):
        tensors, do = inputs(70, 45, d, 24, fp32)
        tensors += tuple(heads_inside(1, 2, s, 20, dtype=fp32) for s in (70, 45))
        check(tensors, do)


def test_fp16_state_does_not_overflow():
    tensors, do = inputs(40, 4096, 16, 16, fp16, h=1)
    q, k, v = tensors
    ours = check(
        (q, k * 0 + 100, v.abs() * 0 + 100),
        do,
        scale=1.0,
        norm_scale=1.0,
        needs=[False, True, True, False, False],
    )
    assert all(value.isfinite().all() for value in ours.values())
