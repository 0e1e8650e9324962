"""Values and gradients of the ATen path against the formula in fp64, next to the naive graph's own
error.
"""

from __future__ import annotations

import pytest
import torch
from linear_attention_formula import (
    assert_within_budget,
    heads_inside,
    operator,
    plain,
    positive,
    results,
    tokens_last,
)

NORMALIZERS = ("none", "add", "clamp")
PAIRS = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
]


def _numbers(normalizer):
    return {} if normalizer == "none" else {"norm_scale": 1 / 32, "eps": 0.125}


def _norms(dtype):
    return positive(2, 3, 70, 8, dtype=dtype), positive(2, 1, 50, 8, dtype=dtype)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
def test_error_is_that_of_the_naive_graph(normalizer, decoupled, dtype, out_dtype):
    q, k = heads_inside(2, 3, 70, 24, dtype=dtype), tokens_last(2, 3, 50, 24, dtype=dtype)
    v = torch.randn(2, 3, 50, 40).to(dtype)
    do = torch.randn(2, 3, 70, 40).to(out_dtype or dtype)
    norms = _norms(dtype) if decoupled and normalizer != "none" else ()
    assert_within_budget(
        (q, k, v, *norms),
        do,
        normalizer=normalizer,
        scale=1 / 32,
        out_dtype=out_dtype,
        **_numbers(normalizer),
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("n", "m"), [(70, 50), (3, 5), (1, 1), (5, 90)])
def test_float64_equals_the_formula(normalizer, decoupled, n, m):
    def make(size, d):
        return torch.rand(2, 3, size, d, dtype=torch.float64)

    tensors = [make(n, 8), make(m, 8), make(m, 6)]
    if decoupled and normalizer != "none":
        tensors += [make(n, 5), make(m, 5)]
    do = torch.randn(2, 3, n, 6, dtype=torch.float64)
    arguments = {"normalizer": normalizer, "scale": 0.3, **_numbers(normalizer)}
    ours = results(operator, tensors, do, **arguments)
    exact = results(plain, tensors, do, **arguments)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=name)


@pytest.mark.parametrize("grad", [False, True])
def test_both_associations_agree(grad):
    """Without gradients a short sequence takes (q kᵀ) v; with them the state is kept for the
    backward.
    """
    q, k, v = (torch.rand(2, 6, 32, dtype=torch.float64, requires_grad=grad) for _ in range(3))
    torch.testing.assert_close(
        operator(q, k, v, normalizer="add", eps=0.5), plain(q, k, v, normalizer="add", eps=0.5)
    )


def test_clamp_stops_the_gradient_of_the_normaliser():
    q = torch.tensor([[1.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    v = torch.tensor([[3.0]], dtype=torch.float64)
    do = torch.ones(2, 1, dtype=torch.float64)
    ours = results(operator, (q, k, v), do, normalizer="clamp", eps=10.0)
    # Row 0 is clamped: out = 3 q·k / 10, so dq = 0.3 k. Row 1 is not: out = 3 whatever q.
    torch.testing.assert_close(ours["dq"], torch.tensor([[0.3, 0.6], [0.0, 0.0]], dtype=q.dtype))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 7, 4), (2, 1, 5, 4), (2, 1, 5, 6)),
        ((1, 3, 7, 4), (2, 1, 5, 4), (1, 3, 5, 6)),
        ((2, 1, 7, 4), (1, 3, 5, 4), (2, 3, 5, 6)),
        ((7, 4), (5, 4), (5, 6)),
        ((2, 3, 2, 7, 4), (1, 3, 1, 5, 4), (2, 1, 1, 5, 6)),
    ],
)
@pytest.mark.parametrize("normalizer", ["none", "add"])
def test_broadcast_batch_dims(shapes, normalizer):
    tensors = [torch.rand(s, dtype=torch.float64) for s in shapes]
    out = plain(*tensors, normalizer=normalizer, eps=0.5)
    do = torch.randn_like(out)
    ours = results(operator, tensors, do, normalizer=normalizer, eps=0.5)
    exact = results(plain, tensors, do, normalizer=normalizer, eps=0.5)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=name)


@pytest.mark.parametrize("kind", ["expanded", "slice of cat", "transposed", "negative-free slice"])
def test_any_incoming_gradient(kind):
    q, k, v = (torch.rand(2, 3, 10, 4, dtype=torch.float64) for _ in range(3))
    do = {
        "expanded": torch.ones((), dtype=torch.float64).expand(2, 3, 10, 4),
        "slice of cat": torch.randn(2, 3, 10, 9, dtype=torch.float64)[..., 5:],
        "transposed": torch.randn(2, 3, 4, 10, dtype=torch.float64).mT,
        "negative-free slice": torch.randn(2, 3, 20, 4, dtype=torch.float64)[:, :, ::2],
    }[kind]
    ours = results(operator, (q, k, v), do, normalizer="add", eps=0.5)
    exact = results(plain, (q, k, v), do, normalizer="add", eps=0.5)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=name)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("b", "n", "m"), [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0)])
def test_zero_sizes_do_as_the_formula_does(normalizer, b, n, m):
    tensors = [torch.rand(b, s, d) for s, d in ((n, 4), (m, 4), (m, 3))]
    do = torch.ones(b, n, 3)
    for eps in (0.5,) if normalizer == "clamp" else (0.5, 0.0):
        numbers = {"normalizer": normalizer, "eps": eps}
        ours, exact = (results(f, tensors, do, **numbers) for f in (operator, plain))
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name], equal_nan=True, msg=name)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 3)])
def test_only_the_gradients_that_are_needed(needs):
    shapes = ((2, 7, 4), (2, 5, 4), (2, 5, 6), (2, 7, 3), (1, 5, 3))
    tensors = [torch.rand(s, dtype=torch.float64) for s in shapes]
    do = torch.randn(2, 7, 6, dtype=torch.float64)
    full = results(plain, tensors, do, normalizer="add", eps=0.5)
    leaves = [t.clone().requires_grad_(i in needs) for i, t in enumerate(tensors)]
    operator(*leaves, normalizer="add", eps=0.5).backward(do)
    for i, (leaf, exact) in enumerate(zip(leaves, list(full.values())[1:], strict=True)):
        assert (leaf.grad is not None) == (i in needs)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, exact)


@pytest.mark.parametrize("out_order", [None, (0, 2, 1, 3), (3, 1, 0, 2)])
def test_every_element_is_written(out_order, monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan"))
    )
    tensors = [
        torch.rand(2, h, s, d)
        for h, s, d in ((3, 9, 4), (1, 7, 4), (3, 7, 5), (1, 9, 2), (3, 7, 2))
    ]
    do = torch.rand(2, 3, 9, 5)
    for value in results(
        operator, tensors, do, normalizer="add", eps=0.5, out_order=out_order
    ).values():
        assert value.isfinite().all()


def test_fp16_state_does_not_overflow():
    k = torch.full((1, 4096, 8), 100.0, dtype=torch.float16)
    q = torch.rand(1, 10, 8).half()
    out = operator(q, k, k, normalizer="add", eps=1e-15)
    torch.testing.assert_close(out, torch.full_like(out, 100.0))
