"""The kernels' arithmetic.

In Triton's interpreter, which must be on before triton is imported: not collected as it stands, but
run by test_kernels_interpreted.py in a process of its own. fp16 and fp32 only; bf16 products are
garbage there.
"""

from __future__ import annotations

import pytest
import torch
from bla_inductor.kernels import heuristics, launching, short_heuristics
from interpreted_cases import (
    ELU1,
    check,
    fp16,
    fp32,
    in_several_launches,
    inputs,
    poisoned,  # noqa: F401 (a fixture)
    signed,
    weights,
)
from linear_attention_formula import NAMES, heads_inside, median_normaliser, tokens_last

from bla_inductor import kernels
from bla_inductor.ops.layout import broadcast, key_batch


@pytest.mark.parametrize("launches", ["one", "several"])
@pytest.mark.parametrize("weight", [None, torch.bool, fp16])
@pytest.mark.parametrize("maps", [(ELU1, ELU1), ("softmax", ELU1)])
@pytest.mark.parametrize("d", [16, 24])
def test_maps_and_weights(d, maps, weight, launches, monkeypatch):
    if launches == "several":
        in_several_launches(monkeypatch)
    tensors, do = inputs(70, 85, d, 24, fp16, signed)
    weight = weight and (torch.rand(1, 2, 85) > 0.3 if weight == torch.bool else weights(85))
    check((*tensors, None, None, weight), do, maps=(*maps, "", ""))


@pytest.mark.parametrize("weight", [None, torch.bool, fp32])
@pytest.mark.parametrize("d", [24, 136])
def test_maps_and_weights_of_a_decoupled_normaliser(d, weight):
    tensors, do = inputs(40, 85, d, 24, fp32, signed)
    norms = (signed(1, 2, 40, 20, dtype=fp32), signed(1, 2, 85, 20, dtype=fp32))
    weight = weight and (
        torch.rand(1, 2, 85) > 0.3 if weight == torch.bool else weights(85).float()
    )
    check((*tensors, *norms, weight), do, maps=(ELU1, "softmax", "softmax", ELU1))


@pytest.mark.parametrize("needed", [(1,), (2,), (5,)])
def test_a_weight_that_is_broadcast(needed):
    tensors, do = inputs(40, 85, 24, 24, fp16, signed)
    weight = weights(85)[:, :1]
    needs = [i in needed for i in range(6)]
    check((*tensors, None, None, weight), do, needs, maps=(ELU1, ELU1, "", ""))


def test_masked_keys_are_not_read():
    (q, k, v), do = inputs(40, 85, 24, 24, fp32, signed)
    weight = torch.rand(1, 2, 85) > 0.5
    expected = check((q, k, v, None, None, weight), do, maps=(ELU1, ELU1, "", ""))
    poison = weight.unsqueeze(-1).expand(k.shape)
    k, v = (torch.where(poison, t, float("nan")) for t in (k, v))
    out = torch.empty_like(do)
    numbers = ("add", 0.7, 0.3, 0.125)
    maps = (ELU1, ELU1, "", "")
    tensors = (q, k, v, None, None, weight)
    state, key_sum = kernels.forward(out, *tensors, key_batch(k, v, None, weight), maps, *numbers)
    assert torch.equal(out, expected["out"])
    grads = [torch.empty_like(t) for t in (q, k, v)] + [None] * 3
    kernels.backward(grads, do, *tensors, state, key_sum, maps, *numbers)
    for name, grad in zip(NAMES, grads[:3], strict=False):
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("n", [40, 300])
def test_a_state_of_any_strides(n):
    """A graph may have kept it for the backward as it liked."""
    (q, k, v), do = inputs(n, 50, 24, 16, fp32, signed, h=3)
    tensors, numbers = (q, k, v, None, None, None), (("",) * 4, "add", 0.7, 0.3, 0.125)
    out = torch.empty_like(do)
    kept = kernels.forward(out, *tensors, key_batch(k, v, None, None), *numbers)
    results = []
    for state, key_sum in (kept, [x.mT.contiguous().mT for x in kept]):
        grads = [torch.empty_like(t) for t in (q, k, v)]
        kernels.backward([*grads, *[None] * 3], do, *tensors, state, key_sum, *numbers)
        results.append(grads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [1, 3])
def test_one_launch_gives_what_several_give(parts, monkeypatch):
    for name in ("short_forward_parts", "short_backward_parts"):
        monkeypatch.setattr(short_heuristics, name, lambda *_: parts)
    seen = []
    original = launching.run
    monkeypatch.setattr(
        launching, "run", lambda k, *a, **c: (seen.append(k.fn.__name__), original(k, *a, **c))
    )
    tensors, do = inputs(200, 140, 24, 24, fp16, signed)
    check(tensors, do, maps=(ELU1, ELU1, "", ""))
    assert seen == ["short_forward_kernel", "short_backward_kernel"]


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
    in_several_launches(monkeypatch)
    tensors, do = inputs(190, 180, d, 24, fp16)
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
    check(tensors, do, needs=[i in needed for i in range(6)])


def test_clamped_rows_of_wide_heads():
    tensors, do = inputs(70, 45, 136, 24, fp32)
    check(tensors, do, normalizer="clamp", eps=median_normaliser(tensors, 0.3))


def test_offsets_in_int64(monkeypatch):
    from bla_inductor.kernels.batch import Batch

    monkeypatch.setattr(Batch, "big", lambda *_: True)
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
        needs=[False, True, True, False, False, False],
    )
    assert all(value.isfinite().all() for value in ours.values())
