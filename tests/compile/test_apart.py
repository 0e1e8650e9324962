"""Channels apart in memory: whether the rewrite pays, by who writes q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite
from tests.compile import nogpu
from tests.compile.test_absorb import WithValues

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="imagines a GPU")

B, C, SIDE, D = 2, 128, 32, 32


def by_convolution(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return F.conv2d(x, weight.view(3 * C, C, 1, 1)).flatten(2)


def with_a_bias(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return F.conv2d(x, weight.view(3 * C, C, 1, 1), weight.select(1, 0)).flatten(2)


def a_channel_more(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    weight = torch.cat([weight, weight.narrow(0, 0, 1)])
    return F.conv2d(x, weight.view(3 * C + 1, C, 1, 1)).flatten(2).narrow(1, 0, 3 * C)


def many_operations(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    for _ in range(400):
        x = x.sin()
    return by_convolution(x, weight, grouped)


def by_convolution_after_a_grouped_one(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    """For which Inductor leaves all images channels first in training."""
    return by_convolution(F.conv2d(x, grouped, padding=1, groups=4), weight, grouped)


def by_convolution_of_sequences(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return F.conv1d(x.flatten(2), weight.unsqueeze(-1))


def by_product(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return weight @ x.flatten(2)


def by_loops(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return torch.cat([x.flatten(2)] * 3, 1).sin()


def given(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
    return x.flatten(2)


IDENTITY = (lambda q: q, lambda k: k)
ELU = (lambda q: F.elu(q) + 1, lambda k: F.elu(k) + 1)
SOFTMAX_OF_KEYS = (lambda q: q, lambda k: k.softmax(-1))
SOFTMAX_OF_BOTH = (lambda q: q.softmax(-2), lambda k: k.softmax(-1))


def rewritten(
    written: Callable[..., Tensor],
    maps: tuple[Callable[..., Tensor], ...],
    training: bool,
    **options: Any,
) -> tuple[Report, fx.Graph]:
    def model(x: Tensor, weight: Tensor, grouped: Tensor) -> Tensor:
        q, k, v = written(x, weight, grouped).chunk(3, 1)
        q, k, v = (t.unflatten(1, (C // D, D)) for t in (q, k, v))
        q, k = maps[0](q), maps[1](k)
        return torch.einsum("bhde,bhdn->bhen", torch.einsum("bhdn,bhen->bhde", k, v), q)

    with nogpu.imagined_gpu():
        with FakeTensorMode() as mode:
            channels = 3 * C if written is given else C
            shapes = (B, channels, SIDE, SIDE), (3 * C, C), (C, C // 4, 3, 3)
            inputs = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        values = WithValues(fx.symbolic_trace(model))
        values.training = training
        with mode, torch.no_grad():
            values.run(*inputs)
        inputs = [x.requires_grad_(training) for x in inputs]
        graph = values.module
        assert isinstance(graph, fx.GraphModule)
        return rewrite(graph, inputs, Options(**options)), graph.graph


def matches(
    written: Callable[..., Tensor], maps: tuple[Callable[..., Tensor], ...], training: bool
) -> int:
    report, _ = rewritten(written, maps, training)
    apart = [r for r in report.refusals if "channels apart in memory" in r.reason]
    assert bool(apart) != bool(report.matches)
    return len(report.matches)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("maps", [IDENTITY, ELU, SOFTMAX_OF_KEYS], ids=["none", "elu", "softmax"])
def test_between_convolutions_it_pays(
    maps: tuple[Callable[..., Tensor], ...], training: bool
) -> None:
    """Inductor lays their results out with their channels last."""
    assert matches(by_convolution, maps, training)


@pytest.mark.parametrize(
    ("written", "maps", "training", "pays"),
    [
        (by_convolution_after_a_grouped_one, SOFTMAX_OF_KEYS, False, True),
        (by_convolution_after_a_grouped_one, SOFTMAX_OF_KEYS, True, True),
        (by_convolution_after_a_grouped_one, ELU, True, True),
        (by_convolution_of_sequences, IDENTITY, False, False),
        (by_convolution_of_sequences, ELU, False, False),
        (by_convolution_of_sequences, SOFTMAX_OF_BOTH, False, True),
        (by_convolution_of_sequences, SOFTMAX_OF_KEYS, False, False),
        (by_convolution_of_sequences, SOFTMAX_OF_KEYS, True, True),
        (by_product, IDENTITY, False, False),
        (by_product, ELU, False, False),
        (by_product, ELU, True, True),
        (by_loops, IDENTITY, False, True),
        (by_loops, IDENTITY, True, True),
        (given, SOFTMAX_OF_KEYS, False, False),
        (given, SOFTMAX_OF_KEYS, True, True),
    ],
)
def test_by_who_writes_them(
    written: Callable[..., Tensor],
    maps: tuple[Callable[..., Tensor], ...],
    training: bool,
    pays: bool,
) -> None:
    assert matches(written, maps, training) == pays


@pytest.mark.parametrize(
    ("written", "maps", "copies"),
    [
        (by_convolution, ELU, 0),
        (by_convolution, SOFTMAX_OF_KEYS, 0),
        (with_a_bias, ELU, 3),
        (with_a_bias, SOFTMAX_OF_KEYS, 2),
        (a_channel_more, ELU, 3),
        (many_operations, ELU, 3),
        (by_convolution_after_a_grouped_one, SOFTMAX_OF_KEYS, 2),
        (by_convolution_of_sequences, ELU, 3),
        (by_loops, ELU, 3),
    ],
)
def test_in_training_what_is_not_beside_is_copied_before(
    written: Callable[..., Tensor], maps: tuple[Callable[..., Tensor], ...], copies: int
) -> None:
    """Once for both directions; not what lies so anyway, as Inductor will have it."""
    report, graph = rewritten(written, maps, True, rewrite="always")
    assert report.matches
    clones = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert len(clones) == copies
    inference = rewritten(written, maps, False, rewrite="always")[1]
    assert not inference.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
