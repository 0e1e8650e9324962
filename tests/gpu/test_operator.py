"""The Triton path on a GPU: accuracy against fp64 next to the naive graph's, layouts, size limits,
determinism.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from linear_attention_formula import (
    FACTOR,
    assert_within_budget,
    heads_inside,
    median_normaliser,
    operator,
    plain,
    positive,
    relative_error,
    results,
    tokens_last,
)

pytestmark = pytest.mark.gpu
ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(bf16, None), (bf16, fp32), (fp16, None), (fp16, fp32), (fp32, None)]


def _signed(*shape, dtype, device):
    return heads_inside(*shape, dtype=dtype, device=device, signed=True)


def _inputs(make, d, dv, dtype, n=1000, m=777, b=2, h=3):
    q, k = (make(b, h, s, d, dtype=dtype, device="cuda") for s in (n, m))
    v = torch.randn(b, h, m, dv, device="cuda").to(dtype)
    return q, k, v, torch.randn(b, h, n, dv, device="cuda")


@pytest.mark.parametrize("d", [8, 32, 40, 64, 72, 80, 96, 112, 128, 160, 256])
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
def test_error_is_that_of_the_naive_graph(d, dtype, out_dtype):
    q, k, v, do = _inputs(heads_inside, d, d, dtype)
    assert_within_budget(
        (q, k, v), do.to(out_dtype or dtype), normalizer="add", eps=1e-6, out_dtype=out_dtype
    )


@pytest.mark.parametrize("d", [8, 32, 40, 64, 72, 80, 96, 112, 128, 160, 256])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("n", [130, 5000])
def test_feature_maps_inside(d, dtype, n):
    q, k, v, do = _inputs(_signed, d, d, dtype, n=n, m=n - 23)
    maps = {"q_map": ELU1, "k_map": ELU1}
    assert_within_budget((q, k, v), do.to(dtype), normalizer="add", eps=1e-6, **maps)


@pytest.mark.parametrize("d", [32, 64, 128, 160])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("kind", ["mask", "float"])
@pytest.mark.parametrize("n", [130, 5000])
def test_key_weights_inside(d, dtype, kind, n):
    q, k, v, do = _inputs(_signed, d, d, dtype, n=n, m=n - 23)
    weight = torch.rand(2, 3, n - 23, device="cuda")
    weight = weight > 0.3 if kind == "mask" else weight.to(dtype)
    maps = {"q_map": ELU1, "k_map": ELU1}
    tensors = (q, k, v, None, None, weight)
    assert_within_budget(tensors, do.to(dtype), normalizer="add", eps=1e-6, **maps)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_large_activations_and_tiny_normalisers(dtype, size):
    q, k, v, do = _inputs(heads_inside, 64, 64, dtype, n=3000, m=3000)
    tensors = (q * size, k * size, v * size)
    assert_within_budget(tensors, do.to(dtype), normalizer="add", eps=1e-15)


@pytest.mark.parametrize(("d", "dv"), [(32, 128), (128, 32), (16, 256), (256, 16), (40, 72)])
@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_value_dim_differs(d, dv, dtype):
    q, k, v, do = _inputs(heads_inside, d, dv, dtype)
    assert_within_budget((q, k, v), do.to(dtype), normalizer="add", eps=1e-6)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_matmul_precision(precision):
    q, k, v, do = _inputs(heads_inside, 64, 64, fp32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert_within_budget((q, k, v), do, normalizer="add", eps=1e-6)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("normalizer", ["none", "add", "clamp"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("make", [heads_inside, tokens_last])
@pytest.mark.parametrize(("d", "dtype"), [(32, bf16), (72, bf16), (160, bf16), (32, fp32)])
def test_normalizers_and_layouts(normalizer, decoupled, make, d, dtype):
    if normalizer == "none" and decoupled:
        pytest.skip("nothing to decouple")
    q, k, v, do = _inputs(make, d, d, dtype)
    norms = (
        make(2, 3, 1000, 24, dtype=dtype, device="cuda"),
        make(2, 1, 777, 24, dtype=dtype, device="cuda"),
    )
    tensors = (q, k, v, *(norms if decoupled else ()))
    eps = median_normaliser(tensors, 1 / 777) if normalizer == "clamp" else 0.125
    numbers = {} if normalizer == "none" else {"norm_scale": 1 / 777, "eps": eps}
    do = tokens_last(2, 3, 1000, d, dtype=dtype, device="cuda", signed=True)
    assert_within_budget(
        tensors,
        do,
        normalizer=normalizer,
        scale=1 / 777,
        **numbers,
    )


@pytest.mark.parametrize("d", [64, 160])
def test_broadcast_heads(d):
    q = positive(2, 4, 3, 500, d, dtype=bf16, device="cuda").transpose(0, 2)
    k = positive(1, 4, 1, 300, d, dtype=bf16, device="cuda")
    v = torch.randn(3, 1, 1, 300, d, device="cuda", dtype=bf16)
    do = torch.randn(3, 4, 2, 500, d, device="cuda", dtype=bf16)
    assert_within_budget((q, k, v), do, normalizer="add", eps=1e-3)


@pytest.mark.parametrize("d", [64, 256])
def test_any_incoming_gradient(d):
    q, k, v, _ = _inputs(heads_inside, d, d, bf16)
    expanded = torch.ones((), device="cuda", dtype=bf16).expand(2, 3, 1000, d)
    sliced = torch.randn(2, 1000, 3, 2 * d + 8, device="cuda", dtype=bf16)[
        ..., d + 3 : 2 * d + 3
    ].transpose(1, 2)
    for do in (expanded, sliced):
        assert_within_budget((q, k, v), do, normalizer="add", eps=1e-3)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (3,), (4,), (1, 3)])
@pytest.mark.parametrize("d", [32, 160])
def test_only_the_gradients_that_are_needed(needs, d):
    q, k, v, do = _inputs(heads_inside, d, d, fp16)
    tensors = [
        q,
        k,
        v,
        positive(2, 3, 1000, 24, dtype=fp16, device="cuda"),
        positive(2, 3, 777, 24, dtype=fp16, device="cuda"),
    ]
    full = results(operator, tensors, do, normalizer="add", eps=0.1, norm_scale=0.01)
    leaves = [t.detach().requires_grad_(i in needs) for i, t in enumerate(tensors)]
    out = operator(*leaves, normalizer="add", eps=0.1, norm_scale=0.01)
    out.backward(do.to(fp16))
    for i, (leaf, name) in enumerate(
        zip(leaves, ("dq", "dk", "dv", "dq_norm", "dk_norm"), strict=True)
    ):
        assert (leaf.grad is not None) == (i in needs)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, full[name], rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("d", [32, 160])
def test_every_element_is_written(d, monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poisoned(new_empty(*a, **k)))
    q, k, v, do = _inputs(heads_inside, d, d, bf16)
    norms = (
        positive(2, 3, 1000, 24, dtype=bf16, device="cuda"),
        positive(2, 3, 777, 24, dtype=bf16, device="cuda"),
    )
    for tensors in ((q, k, v), (q, k, v, *norms)):
        for value in results(operator, tensors, do, normalizer="add", eps=1e-3).values():
            assert value.isfinite().all()


def _poisoned(t):
    return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.mark.parametrize("out_order", [None, (0, 2, 1, 3), (0, 1, 3, 2), (2, 0, 3, 1)])
def test_out_order(out_order):
    q, k, v, _ = _inputs(heads_inside, 40, 72, bf16)
    expected = operator(q, k, v, normalizer="add", eps=1e-3)
    out = operator(q, k, v, normalizer="add", eps=1e-3, out_order=out_order)
    assert torch.equal(out, expected)
    assert out.permute(out_order or (0, 1, 2, 3)).is_contiguous()


def test_more_heads_than_a_grid_axis():
    q, k, v = (positive(70_000, 20, 32, dtype=bf16, device="cuda") for _ in range(3))
    do = torch.randn(70_000, 20, 32, device="cuda").to(bf16)
    assert_within_budget((q, k, v), do, normalizer="add", eps=1e-3)


@pytest.mark.parametrize("make", [heads_inside, tokens_last])
def test_tensors_beyond_int32_offsets(make):
    n, d = 2**31 // 64 + 4096 + 7, 64
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    base = make(1, 1, 4096, d, dtype=bf16, device="cuda")
    memory = torch.empty(
        (1, 1, n, d) if make is heads_inside else (1, 1, d, n), dtype=bf16, device="cuda"
    )
    q = (memory if make is heads_inside else memory.mT).zero_()
    q[..., :4096, :], q[..., -4096:, :] = (
        base,
        base,
    )  # all else is zero, so the oracle needs 8192 rows
    out, state, key_sum = torch.ops.bla.linear_attention_forward(q, q, q, normalizer="add", eps=1.0)
    ends = torch.cat((base, base), -2)
    expected = operator(ends, ends, ends, normalizer="add", eps=1.0)
    assert relative_error(out[..., -4096:, :], expected[..., -4096:, :].double()) < 4e-3
    assert out[..., 4096:-4096, :].count_nonzero() == 0
    needs = [True] * 3 + [False] * 3
    grads = torch.ops.bla.linear_attention_backward(
        q, q, q, q, None, None, None, state, key_sum,
        normalizer="add", scale=1.0, norm_scale=1.0, eps=1.0, needs=needs,
    )  # fmt: skip
    small = torch.ops.bla.linear_attention_backward(
        ends, ends, ends, ends, None, None, None, state, key_sum,
        normalizer="add", scale=1.0, norm_scale=1.0, eps=1.0, needs=needs,
    )  # fmt: skip
    for grad, exact in zip(grads[:3], small, strict=False):
        assert relative_error(grad[..., -4096:, :], exact[..., -4096:, :].double()) < 8e-3


@pytest.mark.parametrize("d", [32, 128, 192])
def test_fp16_does_not_overflow(d):
    q = torch.rand(1, 2, 65536, d, device="cuda").to(fp16)
    k = (torch.rand(1, 2, 65536, d, device="cuda") * 100).to(fp16)
    v = (torch.randn(1, 2, 65536, d, device="cuda") * 10).to(fp16)
    do = torch.randn(1, 2, 65536, d, device="cuda").to(fp16)
    arguments = {"normalizer": "add", "eps": 0.0}
    ours = results(operator, (q, k, v), do, **arguments)
    exact = results(plain, (q.double(), k.double(), v.double()), do.double(), **arguments)
    # The eager graph overflows on k, so the yardstick is its error on k / 2^14, of which the result
    # is independent.
    small = (q, k / 2**14, v)
    naive = results(plain, small, do, **arguments)
    scaled = results(plain, [t.double() for t in small], do.double(), **arguments)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        rounded = relative_error(exact[name].to(fp16), exact[name])
        budget = FACTOR[fp16] * max(rounded, relative_error(naive[name], scaled[name]))
        assert relative_error(value, exact[name]) <= budget, name


@pytest.mark.parametrize("d", [64, 128, 160])
@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_bitwise_deterministic(d, dtype):
    q, k, v, do = _inputs(heads_inside, d, d, dtype, n=5000, m=5000)
    first, second = (results(operator, (q, k, v), do, normalizer="add", eps=1e-3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_dim_above_the_limit_is_an_error():
    x = torch.randn(1, 8, 264, device="cuda")
    with pytest.raises(ValueError, match=r"'q' has a head dim of 264, expected at most 256"):
        operator(x, x, x)


def test_float64_takes_the_aten_path():
    q, k, v, do = _inputs(heads_inside, 16, 16, torch.float64, n=64, m=48)
    ours = results(operator, (q, k, v), do, normalizer="add", eps=0.1)
    exact = results(plain, (q, k, v), do, normalizer="add", eps=0.1)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name])


@pytest.mark.parametrize("size", [(0, 5, 4), (5, 0, 4), (5, 6, 0)])
def test_empty_tensors(size):
    n, m, d = size
    q, k, v = torch.randn(2, n, d).cuda(), torch.randn(2, m, d).cuda(), torch.randn(2, m, 3).cuda()
    torch.testing.assert_close(
        operator(q, k, v, normalizer="add", eps=0.5), plain(q, k, v, normalizer="add", eps=0.5)
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_with_inductor(autocast):
    q, k, v, do = _inputs(heads_inside, 64, 64, bf16)

    def f(q, k, v):
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            out = operator(q * 2, k, v, normalizer="add", eps=1e-3, out_order=[0, 2, 1, 3])
        return out.transpose(1, 2).flatten(2) + 1

    do = do.transpose(1, 2).flatten(2)
    eager = results(f, (q, k, v), do)
    compiled = results(torch.compile(f, dynamic=True), (q, k, v), do)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=2e-2, atol=1e-3)


def test_second_derivative():
    q, k, v, _ = _inputs(heads_inside, 16, 16, fp32, n=40, m=30)

    def penalty(function):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = function(*leaves, normalizer="add", eps=1.0)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, exact in zip(penalty(operator), penalty(plain), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [49, 196, 512])
@pytest.mark.parametrize("d", [24, 64, 72])
@pytest.mark.parametrize("layout", ["rows", "columns", "offset"])
def test_tensors_that_are_read_element_by_element(n, d, layout):
    """Strides and addresses that allow no wide reads: copied, or read wrongly by Triton 3.6."""

    shapes = {"rows": (2, n, 3, d), "columns": (2, 3, d, n), "offset": (2, 3, n, d + 5)}

    def make(signed=False):
        x = torch.randn(shapes[layout], device="cuda")
        x = (x if signed else x.abs() + 0.1).to(bf16)
        if layout == "rows":
            return x.transpose(1, 2)
        return x.mT if layout == "columns" else x[..., 3 : d + 3]

    tensors = make(), make(), make(signed=True)
    assert_within_budget(tensors, make(signed=True), normalizer="add", eps=1e-3)
