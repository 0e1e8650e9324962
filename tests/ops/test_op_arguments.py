# ruff: noqa: E501  (one case a line)
"""Argument errors with their text, result layouts, and agreement of fake with real tensors."""

from __future__ import annotations

import pytest
import torch
from linear_attention_formula import operator, plain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from bla_inductor.ops.dispatch import gradient_orders

X = torch.rand(2, 3, 7, 4)
CASES = [
    ((X, X.half(), X), {}, TypeError, r"'k' has dtype torch.float16, expected torch.float32, the dtype of 'q'.*k\.to"),
    ((X.int(), X.int(), X.int()), {}, TypeError, r"'q' has dtype torch.int32, expected one of torch.bfloat16"),
    ((X, X, X.to("meta")), {}, ValueError, r"'v' is on meta, expected cpu, the device of 'q'.*Move it"),
    ((X, X[0], X), {}, ValueError, r"'k' has shape \(3, 7, 4\), expected 4 dims, as many as 'q'"),
    ((X[0, 0, 0],) * 3, {}, ValueError, r"'q' has shape \(4,\), expected at least 2 dims"),
    ((X, X[..., :3], X), {}, ValueError, r"'k' has shape \(2, 3, 7, 3\), expected size 4 in dim -1, as 'q'"),
    ((X, X, X[..., :5, :]), {}, ValueError, r"'v' has shape \(2, 3, 5, 4\), expected size 7 in dim -2, as 'k'"),
    ((X, X[:, :2], X[:, :2]), {}, ValueError, r"'k' has shape \(2, 2, 7, 4\), expected size 3 or 1 in batch dim 1"),
    ((X, X, X, X), {}, ValueError, r"'q_norm' is given, but normalizer='none' divides by nothing"),
    ((X, X, X, X[..., :2]), {"normalizer": "add"}, ValueError, r"'q_norm' has shape .* expected size 4 in dim -1, as 'k'"),
    ((X, X, X, None, X[..., :2]), {"normalizer": "add"}, ValueError, r"'k_norm' has shape .* expected size 4 in dim -1, as 'q'"),
    ((X, X, X, X[..., :2], X), {"normalizer": "add"}, ValueError, r"'q_norm' has shape .* expected size 4 in dim -1, as 'k_norm'"),
    ((X, X, X), {"normalizer": "softmax"}, ValueError, r"'normalizer' is 'softmax', expected one of 'none', 'add', 'clamp'"),
    ((X, X, X), {"out_dtype": torch.int8}, TypeError, r"'out_dtype' is torch.int8, expected one of"),
    ((X, X, X), {"out_order": [0, 1, 2, 2]}, ValueError, r"'out_order' is \[0, 1, 2, 2\], expected a permutation of"),
]  # fmt: skip


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("args", "kwargs", "error", "text"), CASES, ids=[c[3][:24] for c in CASES])
def test_errors_name_argument_found_expected_and_remedy(args, kwargs, error, text, fake):
    if fake and any(t is not None and t.is_meta for t in args):
        pytest.skip("the fake mode has its own check of devices")
    mode = FakeTensorMode()
    if fake:
        args = [None if t is None else mode.from_tensor(t) for t in args]
    with pytest.raises(error, match="bla::linear_attention: argument " + text):
        operator(*args, **kwargs)


ORDERS = [None, [0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2], [3, 2, 1, 0], [2, 0, 3, 1]]


@pytest.mark.parametrize("out_order", ORDERS)
@pytest.mark.parametrize("n", [1, 7])
def test_result_is_dense_in_the_order_asked_for_and_fakes_agree(out_order, n):
    q, k, v = torch.rand(2, 3, n, 4), torch.rand(2, 1, 5, 4), torch.rand(1, 3, 5, 6)
    arguments = {"normalizer": "add", "eps": 0.5, "out_order": out_order}
    out = operator(q, k, v, **arguments)
    torch.testing.assert_close(out, plain(q, k, v, normalizer="add", eps=0.5))
    assert out.permute(out_order or [0, 1, 2, 3]).is_contiguous()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (q, k, v)]
    real = torch.ops.bla.linear_attention_forward(q, k, v, **arguments)
    fake = torch.ops.bla.linear_attention_forward(*fakes, **arguments)
    for a, b in zip((*real, out), (*fake, operator(*fakes, **arguments)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("normalizer", ["none", "add"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_are_laid_out_like_their_inputs_and_fakes_agree(normalizer, dtype):
    q = torch.rand(2, 7, 3, 4, dtype=dtype).transpose(1, 2)
    k = torch.rand(2, 3, 4, 5, dtype=dtype).mT
    v = torch.rand(2, 1, 5, 6, dtype=dtype).expand(2, 3, 5, 6)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = operator(*leaves, normalizer=normalizer, eps=0.5)
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert dq.stride() == q.stride()
    assert dk.stride() == k.stride()
    assert dv.is_contiguous()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()).requires_grad_() for t in leaves]
    fake_out = operator(*fakes, normalizer=normalizer, eps=0.5)
    for real, fake in zip((dq, dk, dv), torch.autograd.grad(fake_out.sum(), fakes), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_symbolic_sizes_install_no_guards():
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def symbolic(t):
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim())
        return mode.from_tensor(t, symbolic_context=context)

    q = symbolic(torch.rand(2, 9, 3, 4)).transpose(1, 2)
    k, v = (symbolic(torch.rand(2, 3, 11, d)) for d in (4, 6))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    before = len(env.guards)
    out = operator(q, k, v, normalizer="add", eps=0.5, out_order=[0, 2, 1, 3])
    with torch.no_grad():
        torch.ops.bla.linear_attention_backward(
            out, q, k, v, None, None, None, out, out,
            normalizer="add", scale=1.0, norm_scale=1.0, eps=0.5, needs=[True] * 6,
            orders=gradient_orders((q, k, v, None, None)),
        )  # fmt: skip
    assert [str(g.expr) for g in env.guards[before:]] == []
    assert out.permute(0, 2, 1, 3).stride()[-1] == 1
