"""The rewrite in and around checkpoints, autocast and regions without gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.compile.rewriting import attention, compiled, matched, tensors
from tests.numerics import assert_no_less_accurate


def test_checkpoint_body() -> None:
    def model(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=False) * 2

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_parameters_reach_a_checkpoint_body() -> None:
    """A projection in a checkpoint is one although its weight is just a placeholder there."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            return checkpoint(lambda x: x @ self.a @ self.b, x, use_reentrant=False)

    model = LowRank()
    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert matched() == 0


def test_autocast_region() -> None:
    def model(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v)
        return out.float() * 2

    args = tensors()
    exact = attention(*(x.double() for x in args)) * 2
    run = compiled(model)
    ours, eager = run(*args), model(*args)
    assert matched() == 1
    assert ours.dtype == eager.dtype == torch.float32
    assert (ours - exact).norm() <= 1.1 * (eager - exact).norm()
    ours.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in args)


def test_autocast_around_the_model() -> None:
    args = tensors()
    run = compiled(attention)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = run(*args), attention(*args)
    assert matched() == 1
    assert ours.dtype == eager.dtype
    exact = attention(*(x.double() for x in args))
    assert (ours - exact).norm() <= 1.1 * (eager - exact).norm()


def test_gradients_stop_where_the_user_stopped_them() -> None:
    def model(q, k, v):
        with torch.no_grad():
            state = k.mT @ v
        return q @ state

    args = tensors()
    compiled(model)(*args).sum().backward()
    assert matched() == 0
    assert args[0].grad is not None
    assert args[1].grad is args[2].grad is None


def test_attention_inside_a_no_grad_region() -> None:
    def model(q, k, v):
        with torch.no_grad():
            out = attention(q, k, v)
        return out + v

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context) -> None:
    args = tensors(grad=False)
    with context():
        assert_no_less_accurate(compiled(attention), attention, args)
    assert matched() == 1
