"""The ways in which torch.compile is called: modes, compiled autograd, policies of checkpoints.

`dynamic=True` with `fullgraph=True` is in test_spellings.py, CUDA graphs in tests/gpu.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.counted import counted
from tests.numerics import assert_no_less_accurate

AOT = {"inner": "aot_eager"}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(2, 3, 40, 8).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    """On a CPU as well, and with new data in the second call. In bf16, since in fp32 the order of
    the sums decides, which Inductor chooses, and it differs from one torch to the next.
    """
    run = torch.compile(attention, backend="bla", mode=mode, fullgraph=True)
    for _ in range(2):
        assert_no_less_accurate(run, attention, tensors(torch.bfloat16))
    assert counted() == {"graphs": 1, "matched": 1, "refused": 0}


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return attention(*self.qkv(x).chunk(3, -1)).sin()


def gradients(loss: Callable[[], None], model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss()
    return [p.grad.clone() for p in model.parameters()]


def test_compiled_autograd() -> None:
    """One graph of the whole backward holds the operator's backward, whole."""
    model, x = Projected().double(), torch.rand(2, 3, 40, 8).double()
    run = torch.compile(model, backend="bla", options=AOT, fullgraph=True)
    expected = gradients(lambda: model(x).square().sum().backward(), model)
    graphs = []

    def backward_of(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes])
        return graph

    def loss() -> None:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backward_of)):
            run(x).square().sum().backward()

    torch.testing.assert_close(gradients(loss, model), expected)
    (targets,) = graphs
    assert targets.count("bla.linear_attention_backward.default") == 1


def test_a_training_step_compiled_whole() -> None:
    """With compiled autograd, the step's `backward()` does not break what follows it."""
    model, x = Projected().double(), torch.rand(2, 3, 40, 8).double()
    expected = gradients(lambda: model(x).square().sum().backward(), model)

    def step() -> None:
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        run = torch.compile(step, backend="bla", options=AOT)
        torch.testing.assert_close(gradients(run, model), expected)
    assert counters["compiled_autograd"]["captures"] >= 1
    assert counters["bla"]["matched"] >= 1


def calls(function: Callable[[], Any]) -> Counter[str]:
    """How often each of our operators runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return Counter(e.name for e in profile.events() if e.name.startswith("bla::"))


@pytest.mark.parametrize("saved", [True, False])
def test_a_selective_checkpoint_may_name_the_operator(saved: bool) -> None:
    """MUST_SAVE keeps the operator's results; else it runs once more in the backward."""

    def policy(_context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = operator is torch.ops.bla.linear_attention_forward.default
        return CheckpointPolicy.MUST_SAVE if ours and saved else CheckpointPolicy.MUST_RECOMPUTE

    model, x = Projected().double(), torch.rand(2, 3, 40, 8).double()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def body(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    run = torch.compile(body, backend="bla", options=AOT, fullgraph=True)
    expected = gradients(lambda: model(x).square().sum().backward(), model)
    torch.testing.assert_close(gradients(lambda: run(x).square().sum().backward(), model), expected)
    done = calls(lambda: run(x).square().sum().backward())
    assert counters["bla"]["matched"] == 1
    assert done["bla::linear_attention_forward"] == (1 if saved else 2)
    assert done["bla::linear_attention_backward"] == 1
