"""Attention in the pieces that a model comes in: checkpoints, nested compile regions, autocast,
no_grad, DDP's buckets. What crosses a border of a region is read where it crosses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bla_inductor import Report, backend
from tests.numerics import assert_no_less_accurate, assert_within_budget, results

SHAPE = (2, 3, 20, 8)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s).requires_grad_() for s in shapes or (SHAPE,) * 3]


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    options = {"inner": "aot_eager"}
    return torch.compile(function, backend="bla", options=options, fullgraph=True, **kwargs)


def matched() -> int:
    return counters["bla"]["matched"]


# Checkpoints


def test_a_checkpoint_in_a_checkpoint() -> None:
    def inner(q, k, v):
        return attention(q, k, v) + checkpoint(attention, k, q, v, use_reentrant=False)

    def model(q, k, v):
        return checkpoint(inner, q, k, v, use_reentrant=False) * 2

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 2


def keeps_products(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_selective_checkpoint_of_matrix_products() -> None:
    """The policy names operators that are gone after the rewrite: the rest is recomputed."""
    contexts = functools.partial(create_selective_checkpoint_contexts, keeps_products)

    def model(q, k, v):
        def body(q, k, v):
            return attention(q, k, v).sin()

        return checkpoint(body, q, k, v, use_reentrant=False, context_fn=contexts)

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_a_state_from_outside_a_checkpoint_is_an_input_of_its_body() -> None:
    """Half of the attention is in the body: it stays there, and is recomputed as the user asked."""

    def model(q, k, v):
        state = k.mT @ v
        return checkpoint(lambda q, s: (q @ s).sin(), q, state, use_reentrant=False)

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 0


def test_symbolic_sizes_in_a_checkpoint() -> None:
    """1/n is 1/n inside the body as well: one compilation for two lengths."""

    def body(q, k, v):
        n = k.shape[-2]
        q, k = F.relu(q), F.relu(k)
        z = q @ k.mean(-2, keepdim=True).mT + 1e-6
        return q @ ((k.mT * n**-0.5) @ (v * n**-0.5)) / z

    def model(q, k, v):
        return checkpoint(body, q, k, v, use_reentrant=False)

    run = compiled(model, dynamic=True)
    for n in (20, 33):
        assert_no_less_accurate(run, model, tensors(*[(2, 3, n, 8)] * 3))
    assert counters["bla"]["graphs"] == 1
    assert matched() == 1


# Nested compile regions


def test_a_nested_compile_region_is_rewritten_once_for_all_its_calls() -> None:
    region = torch.compiler.nested_compile_region(attention)

    def model(q, k, v):
        return region(q, k, region(k, q, v))

    def plain(q, k, v):
        return attention(q, k, attention(k, q, v))

    assert_no_less_accurate(compiled(model), plain, tensors())
    assert counters["bla"]["graphs"] == 1
    assert matched() == 1


def test_layers_of_one_class_in_nested_regions() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return x + attention(*self.qkv(x).chunk(3, -1))

    model = nn.Sequential(Block(), Block(), Block())
    run = compiled(model)
    x = torch.randn(2, 20, 8, requires_grad=True)  # else the first layer is another body
    torch.testing.assert_close(run(x), model(x))
    sources = [x, *model.parameters()]
    ours, eager = (torch.autograd.grad(f(x).sin().sum(), sources) for f in (run, model))
    torch.testing.assert_close(ours, eager)
    assert matched() == 1  # one body, three calls


# Autocast


def test_an_attention_that_leaves_autocast_half_way() -> None:
    """The state is rounded to bf16 by the user's region, and the rest is in fp32."""

    def model(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            state = k.mT @ v
        return q @ state.float()

    args = tensors()
    exact = results(
        lambda q, k, v: q @ (k.mT @ v), [x.detach().double().requires_grad_() for x in args]
    )
    run = compiled(model)
    for i, rows in enumerate(zip(results(run, args), results(model, args), exact, strict=True)):
        assert_within_budget(f"result {i}", *rows)


def test_autocast_switched_off_inside() -> None:
    """The user's fp32 island inside autocast is no less accurate than it was."""

    def model(q, k, v):
        with torch.autocast("cpu", enabled=False):
            return attention(q, k, v)

    def under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return call

    args = tensors((2, 3, 64, 16), (2, 3, 64, 16), (2, 3, 64, 16))
    assert_no_less_accurate(under_autocast(compiled(model)), under_autocast(model), args)
    assert matched() == 1


# no_grad


def test_a_normaliser_without_gradients() -> None:
    """The numerator may be fused; the divisor is a constant to autograd and has to stay one."""

    def model(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        with torch.no_grad():
            z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
        return q @ (k.mT @ v) / z

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_gradients_switched_on_inside_no_grad() -> None:
    def model(q, k, v):
        with torch.no_grad():
            scale = v.abs().amax()
            with torch.enable_grad():
                out = attention(q, k, v)
        return out * scale

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_a_detached_key() -> None:
    def model(q, k, v):
        return attention(q, k.detach(), v)

    run, args = compiled(model), tensors()
    run(*args).sum().backward()
    assert args[1].grad is None
    assert_no_less_accurate(run, model, args)
    assert matched() == 1


# DDP


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Blocks(nn.Module):
    """Layers of 1.2 MB each: DDP's first bucket takes 1 MB at least."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(320, 960) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.qkv:
            q, k, v = projection(x).unflatten(-1, (3, 20, 16)).permute(2, 0, 3, 1, 4)
            x = x + attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dynamic", [False, True])
def test_ddp_pieces(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of one layer: Dynamo's DDP pass hands the backend a graph for each."""
    reports: list[Report] = []
    monkeypatch.setattr(backend, "announce", reports.append)
    model = Blocks()
    parallel = DistributedDataParallel(model, bucket_cap_mb=1)
    run = torch.compile(parallel, backend="bla", options={"inner": "aot_eager"}, dynamic=dynamic)
    for n in (24, 40) if dynamic else (24,):
        x = torch.randn(2, n, 320)
        expected = torch.autograd.grad(model(x).sin().sum(), model.parameters())
        model.zero_grad()
        out = run(x)
        torch.testing.assert_close(out, model(x))
        out.sin().sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert [len(report.matches) for report in reports if report.matches] == [1, 1, 1]


def test_the_branches_of_a_condition():
    def model(q, k, v):
        return torch.cond(
            q.sum() > 0, lambda q, k, v: q @ (k.mT @ v), lambda q, k, v: v * 2.0, (q, k, v)
        )

    inputs = [torch.rand(2, 3, 20, 8, requires_grad=True) for _ in range(3)]
    ours = torch.compile(model, backend="bla", options={"inner": "aot_eager"}, fullgraph=True)
    assert_no_less_accurate(ours, model, inputs)
    assert counters["bla"]["matched"] > 0
