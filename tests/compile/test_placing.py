"""A gradient that is copied as a whole is written as the copy: the same values, and no copy."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from bla_inductor.ops.packed import linear_attention_backward_packed
from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.packing import pack_gradients
from bla_inductor.placing import place_gradients
from bla_inductor.slices import value
from tests.compile.test_images import SIDE, B, D, H, image, laid, undone, weight
from tests.compile.test_packing import attention, gradients

aten = torch.ops.aten


def other() -> Tensor:
    return torch.linspace(-1, 1, B * H * D * SIDE**2).view(B, H, SIDE**2, D)


def heads(x: Tensor) -> Tensor:
    return F.conv2d(x, weight(H * D)).unflatten(1, (H, D)).flatten(3).mT


def queries(x: Tensor) -> Tensor:
    return attention(heads(x), other(), other().sin())


def keys(x: Tensor) -> Tensor:
    return attention(other(), heads(x), other().sin())


def keys_and_values_together(x: Tensor) -> Tensor:
    """Packed: dq is the second result then."""
    kv = F.conv2d(x.cos(), weight(2 * H * D)).chunk(2, 1)
    return attention(heads(x), *(t.unflatten(1, (H, D)).flatten(3).mT for t in kv))


def halves(x: Tensor) -> Tensor:
    """Half of the heads each: of what is copied, the gradient is no part of its own."""
    q = torch.stack([heads(x)[..., : D // 2], heads(x)[..., D // 2 :]], -1).flatten(3)
    return attention(q, other(), other().sin())


def heads_in_the_batch(x: Tensor) -> Tensor:
    """Of (batch · heads) in memory with tokens outside of heads there is no view."""
    q, k, v = (t.reshape(B * H, SIDE**2, D) for t in (heads(x), other(), other().sin()))
    return attention(q, k, v)


def placed(graph: fx.Graph, device_type: str) -> int:
    laid(graph, device_type)
    pack_gradients(graph, device_type)
    return place_gradients(graph, device_type)


@pytest.mark.parametrize("function", [queries, keys, keys_and_values_together])
def test_the_kernels_write_what_was_copied(function: Callable[[Tensor], Tensor]) -> None:
    before, after, graph, count = gradients(function, image(), placed)
    torch.testing.assert_close(after, before)
    assert count == 1
    assert not graph.find_nodes(op="call_function", target=aten.clone.default)
    for reader in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        assert value(reader.args[0]).is_contiguous(memory_format=torch.channels_last)
    packed = graph.find_nodes(op="call_function", target=linear_attention_backward_packed)
    (operator,) = packed or graph.find_nodes(op="call_function", target=linear_attention_backward)
    number = 1 if function is keys else 0
    (gradient,) = [u for u in operator.users if u.args[1] == number + len(packed)]
    assert value(gradient).stride() == (SIDE**2 * H * D, D, H * D, 1)


def placed_while_fake(graph: fx.Graph, device_type: str) -> int:
    """Where the compiler's mode is active, `view` raises another error."""
    fake: Any = next(v for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
    with fake.fake_mode:
        return placed(graph, device_type)


@pytest.mark.parametrize(("function", "asked"), [(halves, 0), (heads_in_the_batch, 1)])
@pytest.mark.parametrize("pass_over", [placed, placed_while_fake])
def test_other_copies_stay(
    function: Callable[[Tensor], Tensor],
    asked: int,
    pass_over: Callable[[fx.Graph, str], int],
    caplog: Any,
) -> None:
    """asked: the gradients that are written with their features beside each other instead."""
    before, after, graph, count = gradients(function, image(), pass_over)
    assert count == asked
    assert not [r for r in caplog.records if r.name.startswith("bla_inductor")]
    assert graph.find_nodes(op="call_function", target=aten.clone.default)
    torch.testing.assert_close(after, before)


class Alone:
    """A graph of dq alone, laid out like q in `order`, and what reads it."""

    def __init__(self, order: list[int], read: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
        self.graph = fx.Graph()
        do, q = self.graph.placeholder("do"), self.graph.placeholder("q")
        self.operator = self.graph.call_function(linear_attention_backward, (do, q, q, q))
        self.gradient = self.graph.call_function(getitem, (self.operator, 0))
        sizes = B, H, 5, D
        memory = torch.empty([sizes[d] for d in order], device="meta")
        for node in (do, q, self.gradient):
            node.meta["val"] = memory.permute([order.index(d) for d in range(4)])
        self.graph.output(read(self.graph, self.gradient))

    def strides(self) -> tuple[int, ...]:
        return value(self.gradient).stride()


def copied(order: list[int]) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def read(graph: fx.Graph, gradient: fx.Node) -> fx.Node:
        view = graph.call_function(aten.permute.default, (gradient, order))
        view.meta["val"] = value(gradient).permute(order)
        copy = graph.call_function(aten.clone.default, (view,))
        copy.meta["val"] = view.meta["val"].contiguous()
        return copy

    return read


def seen(graph: fx.Graph, gradient: fx.Node) -> fx.Node:
    view = graph.call_function(aten.permute.default, (gradient, [0, 2, 1, 3]))
    view.meta["val"] = value(gradient).permute([0, 2, 1, 3])
    return view


def used(graph: fx.Graph, gradient: fx.Node) -> fx.Node:
    sine = graph.call_function(aten.sin.default, (seen(graph, gradient),))
    sine.meta["val"] = torch.empty(B, 5, H, D, device="meta")
    return sine


TOKENS, FEATURES = [0, 2, 1, 3], [0, 1, 3, 2]  # outside of heads; outside of tokens


def test_a_copy_with_tokens_outside_is_written_by_the_kernels() -> None:
    made = Alone([0, 1, 2, 3], copied(TOKENS))
    assert place_gradients(made.graph, "meta") == 1
    assert made.operator.kwargs["orders"][:8] == [*TOKENS, 0, 1, 2, 3]
    assert made.strides() == (5 * H * D, D, H * D, 1)
    assert not made.graph.find_nodes(op="call_function", target=aten.clone.default)


@pytest.mark.parametrize(
    ("order", "read", "count"),
    [
        ([0, 1, 2, 3], copied(FEATURES), 0),
        ([0, 1, 2, 3], used, 0),
        (TOKENS, used, 0),
        (FEATURES, used, 1),
        (FEATURES, seen, 0),
        (FEATURES, copied([0, 3, 1, 2]), 1),
    ],
)
def test_features_are_beside_each_other(
    order: list[int], read: Callable[[fx.Graph, fx.Node], fx.Node], count: int
) -> None:
    """Unless users see the strides, which are those of q then."""
    made = Alone(order, read)
    copies = len(made.graph.find_nodes(op="call_function", target=aten.clone.default))
    before = made.strides()
    assert place_gradients(made.graph, "meta") == count
    assert made.strides() == ((5 * H * D, 5 * D, D, 1) if count else before)
    assert len(made.graph.find_nodes(op="call_function", target=aten.clone.default)) == copies


def test_a_failure_of_the_pass_leaves_the_graph(caplog: Any) -> None:
    def run(graph: fx.Graph, device_type: str) -> int:
        laid(graph, device_type)
        return undone(place_gradients, "placing._without_copies", caplog, graph, device_type)

    before, after, _, count = gradients(queries, image(), run)
    assert count == 0
    torch.testing.assert_close(after, before)
    assert "copied to where they are read" in caplog.text
