"""What a program writes into an attention's result, or into what is made of it, stays written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

Results = Tensor | tuple[Tensor, ...]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v) / (q @ k.sum(-2).unsqueeze(-1) + 1)


def rows(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    o[:, :, 13:] = 0
    return o


def rows_of_a_quotient(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = normalised(q, k, v)
    o[..., 0] = 3
    return o * 2


def projected(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = F.linear(attention(q, k, v), v[0, 0, :8])
    o[:, :, 13:] = 0
    return o


def with_a_residual(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v) + v
    o[:, :, 13:] = 0
    return o


def in_another_dtype(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v).to(torch.float64)
    o[..., 2] = 0
    return o


def cloned(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v).clone()
    o[..., 2] = 0
    return o


def by_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    o[v > 0.5] = 0
    return o


def through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    o.view(2, 2, -1)[..., 3:] = 1
    return o


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    p = o.transpose(1, 2)
    p[:, 2] = 0
    return o.flatten(2), p.sum()


def from_itself(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    o[:] = o.flip(2)
    return o


def a_list(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o, other = attention(q, k, v), torch.ones_like(v)
    torch._foreach_add_([o, other], 1.0)
    return o, other


def into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Results:
    buffer = torch.zeros_like(v)
    buffer[:, :, 3:] = attention(q, k, v)[:, :, 3:]
    return buffer


def into_a_buffer_and_then_itself(q: Tensor, k: Tensor, v: Tensor) -> Results:
    buffer, o = torch.zeros_like(v), attention(q, k, v)
    buffer[...] = o
    o[..., 0] = 5
    return buffer, o


def divided_in_place(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v)
    o.div_(q @ k.sum(-2).unsqueeze(-1) + 1)
    o[..., 0] = 3
    return o


@torch.library.custom_op("bla_tests::double_", mutates_args={"x"})
def double_(scale: Tensor, x: Tensor) -> None:
    x.mul_(2 * scale)


@double_.register_fake
def _(scale: Tensor, x: Tensor) -> None:
    pass


def a_custom_operator(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v) + 1
    double_(v[0, 0, 0, :1].detach(), o)
    return o


@torch.library.custom_op("bla_tests::total_and_clear", mutates_args={"x"})
def total_and_clear(x: Tensor) -> Tensor:
    total = x.sum()
    x.zero_()
    return total


@total_and_clear.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


def a_custom_operator_with_a_result(q: Tensor, k: Tensor, v: Tensor) -> Results:
    o = attention(q, k, v).detach()
    total = total_and_clear(o)
    return o, total


def into_the_divisor_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Results:
    z = q @ k.sum(-2).unsqueeze(-1)
    with torch.no_grad():
        z[z < 42.0] = 42.0
    return attention(q, k, v) / z


FUNCTIONS: list[Callable[[Tensor, Tensor, Tensor], Results]] = [
    rows,
    rows_of_a_quotient,
    projected,
    with_a_residual,
    in_another_dtype,
    cloned,
    by_a_mask,
    through_a_view,
    transposed,
    from_itself,
    a_list,
    into_a_buffer,
    into_a_buffer_and_then_itself,
    divided_in_place,
    into_the_divisor_without_gradients,
    a_custom_operator,
    a_custom_operator_with_a_result,
]


def results(function: Callable[..., Results], leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    differentiable = [o for o in outs if o.requires_grad]
    if not differentiable:
        return outs
    total = sum((o.double().sin().sum() for o in differentiable), torch.zeros(()).double())
    return [*outs, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_it_stays_written(function: Callable[..., Results], inner: str) -> None:
    options = {"inner": inner, "rewrite": "always"}
    given = [torch.rand(2, 2, 20, 8) for _ in range(3)]
    leaves = [[x.clone().requires_grad_() for x in given] for _ in range(2)]
    counters.clear()
    ours = results(torch.compile(function, backend="bla", options=options), leaves[0])
    assert counters["bla"]["matched"] == 1
    for mine, theirs in zip(ours, results(function, leaves[1]), strict=True):
        torch.testing.assert_close(mine, theirs)
