"""Gradients that the program cuts, or bends, stay so: in an inference mode inside of the graph, in
code that Dynamo does not look into, and by hooks. The report says what stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import bla_inductor

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Threefold(torch.autograd.Function):
    """Attention with a gradient that only its author can know, and with two results."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k = q.exp(), k.exp()
        state, z = k.mT @ v, q @ k.sum(-2).unsqueeze(-1)
        ctx.save_for_backward(q, state)
        ctx.mark_non_differentiable(z)
        ctx.scale = scale
        return q @ state * scale, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, state = ctx.saved_tensors
        return 3 * q * (grad @ state.mT) * ctx.scale, None, 3 * q, None


@torch.compiler.allow_in_graph
def reversed_(x: Tensor) -> Tensor:
    return Reversed.apply(x)


@torch.compiler.allow_in_graph
def state_without_gradient(k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return k.mT @ v


@torch.compiler.allow_in_graph
def attention_of_constant_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        state = k.mT @ v
    return q @ state.clone()


@torch.compiler.allow_in_graph
def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


library = torch.library.Library("bla_tests_cut", "DEF")
library.define("state(Tensor k, Tensor v) -> Tensor")
library.impl("state", lambda k, v: Reversed.apply(k).mT @ v, "CompositeImplicitAutograd")


def inference_mode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        state = k.mT @ v
    return q @ state.clone()


def inference_mode_in_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        state = k.mT @ v
        with torch.inference_mode():
            scale = v.mean()
        state = state * 2
    return q @ state + scale


def gradients_switched_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        torch._dynamo.graph_break()
        state = k.mT @ v
        with torch.enable_grad():
            return q @ state


def state_reversed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ reversed_(k.mT @ v)


def features_reversed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (reversed_(k.relu()).mT @ v)


def constant_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ state_without_gradient(k, v)


def constant_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_of_constant_keys(q, k, v)


def operator_of_the_users(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ torch.ops.bla_tests_cut.state(k, v)


def gradient_of_the_users(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, z = Threefold.apply(q, k, v, 0.5)
    return out / z


def slice_taken_without_gradients_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        total = q[:, :10].exp().sum()
    return q[:, :10] @ (k.mT @ v) + total


def nothing_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain_attention(q, k, v)


def clipped(grad: Tensor) -> Tensor:
    return grad.clamp(-0.1, 0.1)


def hook_on_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q @ (k.mT @ v)
    out.register_hook(clipped)
    return out.transpose(0, 1)


def hook_on_the_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = k.mT @ v
    state.register_hook(clipped)
    return q @ state


def hook_on_the_state_after_its_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = k.mT @ v
    out = q @ state
    state.register_hook(clipped)
    return out


def hook_on_the_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.exp()
    out = q @ (k.mT @ v)
    k.register_hook(clipped)
    return out / (q @ k.sum(-2).unsqueeze(-1)).abs()


def hook_on_the_divisor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.sum(-2).unsqueeze(-1) + 30
    z.register_hook(clipped)
    return q @ (k.mT @ v) / z


HOOKS = find_spec("torch._higher_order_ops.register_hook") is not None  # else they break the graph
CASES: list[tuple[Function, int]] = [
    (inference_mode, 0),
    (inference_mode_in_no_grad, 0),
    (gradients_switched_on, 0),
    (state_reversed, 0),
    (features_reversed, 1),
    (constant_state, 0),
    (constant_keys, 0),
    (operator_of_the_users, 0),
    (nothing_cut, 1),
    (gradient_of_the_users, 1),
    (slice_taken_without_gradients_before, 1),
]
HOOKED: list[tuple[Function, int]] = [
    (hook_on_the_result, 1),
    (hook_on_the_state, 0),
    (hook_on_the_state_after_its_use, 0),
    (hook_on_the_features, 1),
    (hook_on_the_divisor, 1),
]
CASES += HOOKED if HOOKS else []


# AOTAutograd of torch 2.11 cannot trace an inference mode, and leaves its thread unusable.
INNER = dict.fromkeys((inference_mode, inference_mode_in_no_grad, constant_keys), "eager")


@pytest.mark.parametrize(("function", "matches"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_gradients_are_the_programs(function: Function, matches: int) -> None:
    options = {"inner": INNER.get(function, "aot_eager"), "rewrite": "always"}
    leaves = [torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    counters.clear()
    found = []
    for f in (torch.compile(function, backend="bla", options=options), function):
        out = f(*leaves)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)])
    assert [x is None for x in found[0]] == [x is None for x in found[1]]
    torch.testing.assert_close(*([x for x in each if x is not None] for each in found))
    assert counters["bla"]["matched"] == matches


@pytest.mark.parametrize(("function", "matches"), HOOKED, ids=[f.__name__ for f, _ in HOOKED])
def test_hooks_under_compiled_autograd(function: Function, matches: int) -> None:
    options = {"inner": "aot_eager", "rewrite": "always"}
    given = [torch.randn(2, 20, 8, dtype=torch.float64) for _ in range(3)]
    ours, eager = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    counters.clear()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        torch.compile(function, backend="bla", options=options)(*ours).sin().sum().backward()
    function(*eager).sin().sum().backward()
    torch.testing.assert_close([x.grad for x in ours], [x.grad for x in eager])
    assert counters["bla"]["matched"] == matches


@pytest.mark.parametrize(
    ("function", "step"),
    [
        (inference_mode_in_no_grad, "no_grad"),
        (constant_state, "state_without_gradient"),
        pytest.param(
            hook_on_the_state,
            "register_hook",
            marks=pytest.mark.skipif(not HOOKS, reason="this torch breaks the graph at a hook"),
        ),
    ],
)
def test_the_report_says_so(function: Function, step: str) -> None:
    leaves = [torch.randn(2, 20, 8, requires_grad=True) for _ in range(3)]
    (refusal,) = bla_inductor.explain(function, *leaves).refusals
    assert f"`{step}` stands between the two products" in refusal.reason
