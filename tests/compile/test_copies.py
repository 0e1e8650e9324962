"""Copies around the backward operator that are not made, with the same gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bla_inductor.copies import remove_copies
from tests.compile.test_packing import FORMULA, B, D, H, N, attention, example, gradients

aten = torch.ops.aten
bla = torch.ops.bla


def folded(x):
    """Batch and heads in one dim: the incoming gradient is copied into it."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in x.unflatten(-1, (3, H, D)).unbind(2))
    q, k, v = (t.unflatten(0, (B, H)) for t in (q, k, v))
    out = bla.linear_attention(q, k, v, **FORMULA).flatten(0, 1)
    return out.unflatten(0, (B, H)).transpose(1, 2).reshape(B, N, H * D)


def mapped(x):
    """Feature maps over all heads between the projection and the attention."""
    q, k, v = x.reshape(B, N, 3, H * D).permute(2, 0, 1, 3).unbind(0)
    q, k = (t.softmax(-1) for t in (q, k))
    return attention(*(t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v)))


def mapped_and_last(x):
    """As above, but one channel of q, k and v after the other: parts of four bytes."""
    q, k, v = x.reshape(B, N, H * D, 3).permute(3, 0, 1, 2).unbind(0)
    q, k = (t.softmax(-1) for t in (q, k))
    return attention(*(t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v)))


def beside_an_attention(x):
    """Half of x goes through the attention, the other half is joined by itself."""
    own, other = x.chunk(2, -1)
    q, k, v = other.reshape(B, N, 3, H * D).permute(2, 0, 1, 3).unbind(0)
    rest = q.softmax(-1) * k.softmax(-1) * v
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in own.chunk(3, -1))
    return attention(q, k, v) + rest


def copies(graph: Any) -> int:
    return sum(node.target is aten.clone.default for node in graph.nodes)


def test_the_incoming_gradient_is_read_where_it_is() -> None:
    before, after, graph, count = gradients(folded, example(folded), remove_copies)
    assert count == 1
    (backward,) = graph.find_nodes(op="call_function", target=bla.linear_attention_backward.default)
    assert not backward.args[0].meta["val"].is_contiguous()
    assert torch.equal(before, after)


def test_gradients_are_joined_where_they_end_up() -> None:
    before, after, graph, count = gradients(mapped, example(mapped), remove_copies)
    assert count == 1
    assert copies(graph) == 0
    (cat,) = graph.find_nodes(op="call_function", target=aten.cat.default)
    assert cat.meta["val"].shape[cat.args[1]] == 3
    assert torch.equal(before, after)


@pytest.mark.parametrize("function", [mapped_and_last, beside_an_attention])
def test_other_copies_stay(function: Callable[..., Any]) -> None:
    def rewrite(graph: Any, device_type: str) -> int:
        seen.append(copies(graph))
        return remove_copies(graph, device_type)

    seen: list[int] = []
    x = torch.randn(B, N, 6 * H * D) if function is beside_an_attention else example(function)
    before, after, graph, count = gradients(function, x, rewrite)
    assert count == 0
    assert copies(graph) == seen[0] > 0
    assert torch.equal(before, after)


def test_a_failure_of_the_pass_leaves_the_graph(monkeypatch, caplog) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    monkeypatch.setattr("bla_inductor.copies.moved", fail)
    with caplog.at_level(logging.WARNING, logger="bla_inductor"):
        before, after, graph, count = gradients(mapped, example(mapped), remove_copies)
    assert count == 0
    assert copies(graph) == 1
    assert torch.equal(before, after)
    assert "copies around the backward stay" in caplog.text
