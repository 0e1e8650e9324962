"""Gradients that go into a convolution whose image has its channels last: laid out so, by the
kernels or by the join.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from operator import getitem
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bla_inductor.copies import remove_copies
from bla_inductor.images import lay_channels_last
from bla_inductor.ops.packed import linear_attention_backward_packed
from bla_inductor.ops.schema import linear_attention_backward
from bla_inductor.packing import pack_gradients
from bla_inductor.slices import value
from tests.compile.test_packing import attention, gradients

aten = torch.ops.aten
B, C, SIDE, H, D = 2, 5, 4, 3, 8


def weight(channels: int) -> Tensor:
    return torch.linspace(-40, 40, channels * C).sin().view(channels, C, 1, 1)


def projected(x: Tensor) -> list[Tensor]:
    """q, k, v (B, H, D, N)."""
    return [t.unflatten(1, (H, D)).flatten(3) for t in F.conv2d(x, weight(3 * H * D)).chunk(3, 1)]


def all_ours(x: Tensor) -> Tensor:
    return attention(*(t.mT for t in projected(x)))


def softmax_of_the_keys(x: Tensor) -> Tensor:
    q, k, v = projected(x)
    return attention(q.mT, k.softmax(-1).mT, v.mT)


def alone(x: Tensor) -> Tensor:
    """A convolution for the queries; keys and values are not differentiated."""
    q = F.conv2d(x, weight(H * D)).unflatten(1, (H, D)).flatten(3)
    other = torch.linspace(-1, 1, B * H * D * SIDE**2).view(B, H, SIDE**2, D)
    return attention(q.mT, other, other.sin())


def as_inductor_keeps_it(graph: fx.Graph) -> None:
    """What the convolution reads has its channels last, which autograd did not know."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        image = node.args[1]
        image.meta["val"] = value(image).contiguous(memory_format=torch.channels_last)


def laid(graph: fx.Graph, device_type: str) -> int:
    as_inductor_keeps_it(graph)
    return lay_channels_last(graph, device_type)


def laid_and_joined(graph: fx.Graph, device_type: str) -> int:
    count = laid(graph, device_type)
    return count + pack_gradients(graph, device_type) + remove_copies(graph, device_type)


def given(graph: fx.Graph) -> fx.Node:
    """The gradient that the convolution's backward reads."""
    (reader,) = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return reader.args[0]


def image() -> Tensor:
    return torch.randn(B, C, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("function", [all_ours, softmax_of_the_keys, alone])
def test_the_gradient_of_an_image_has_its_channels_last(function: Any) -> None:
    before, after, graph, count = gradients(function, image(), laid)
    assert count == 1
    assert value(given(graph)).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before)


def test_the_kernels_write_it() -> None:
    before, after, graph, count = gradients(all_ours, image(), laid_and_joined)
    assert count >= 2
    assert given(graph).target is aten.permute.default
    source = given(graph).args[0]
    assert source.args[0].target is linear_attention_backward_packed
    assert not graph.find_nodes(op="call_function", target=aten.cat.default)
    torch.testing.assert_close(after, before)


def test_what_others_compute_is_joined_there() -> None:
    before, after, graph, _ = gradients(softmax_of_the_keys, image(), laid_and_joined)
    (cat,) = graph.find_nodes(op="call_function", target=aten.cat.default)
    assert given(graph).args[0] is cat
    assert value(cat).shape == (B, SIDE, SIDE, 3 * H * D)
    torch.testing.assert_close(after, before)


def test_with_its_channels_first_it_stays() -> None:
    _, _, graph, count = gradients(all_ours, image(), lay_channels_last)
    assert count == 0
    assert value(given(graph)).is_contiguous()


def test_a_gradient_that_users_see_keeps_its_strides() -> None:
    graph = fx.Graph()
    placed = [graph.placeholder(name) for name in ("do", "image", "weight")]
    operator = graph.call_function(linear_attention_backward, (placed[0],))
    gradient = graph.call_function(getitem, (operator, 0))
    reader = graph.call_function(aten.convolution_backward.default, (gradient, *placed[1:]))
    output = graph.output((reader, gradient))
    for node in (*placed, gradient):
        node.meta["val"] = torch.empty(B, C, SIDE, SIDE, device="meta")
    as_inductor_keeps_it(graph)
    assert lay_channels_last(graph, "meta") == 1
    assert output.args[0][1] is gradient
    assert value(given(graph)).is_contiguous(memory_format=torch.channels_last)


def undone(
    run: Callable[..., int], step: str, caplog: Any, graph: fx.Graph, device_type: str
) -> int:
    """A pass, `run`, that fails when it has taken `step`: a warning, and the graph is as it was."""
    real, before = pkgutil.resolve_name(f"bla_inductor.{step}"), str(graph)

    def fail(*args: Any) -> None:
        real(*args)
        raise KeyError("on purpose")

    with (
        mock.patch(f"bla_inductor.{step}", fail),
        caplog.at_level(logging.WARNING, logger="bla_inductor"),
    ):
        count = run(graph, device_type)
    assert str(graph) == before
    return count


def test_a_failure_of_the_pass_leaves_the_graph(caplog: Any) -> None:
    def run(graph: fx.Graph, device_type: str) -> int:
        as_inductor_keeps_it(graph)
        return undone(lay_channels_last, "images._lay", caplog, graph, device_type)

    before, after, _, count = gradients(all_ours, image(), run)
    assert count == 0
    torch.testing.assert_close(after, before)
    assert "stay as autograd lays them out" in caplog.text
