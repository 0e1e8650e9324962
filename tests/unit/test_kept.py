"""Which strides Inductor is told for what a forward keeps. What it makes of them is in
tests/compile/test_codegen_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from bla_inductor import kept
from bla_inductor.ops.schema import linear_attention_forward

aten = torch.ops.aten
B, H, N, D = 2, 3, 20, 8
C = H * D


class Kept:
    """The graph of a forward whose results are `out`, k and the state, and what keeps them.

    compute: of an input of `shape`, k in the graph; value: k.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        compute: Callable[[fx.Graph, fx.Node], fx.Node],
        value: Callable[[Tensor], Tensor],
    ) -> None:
        self.graph = fx.Graph()
        with FakeTensorMode():
            given = torch.empty(shape, device="cuda")
            k, q = value(given), torch.empty(B, H, N, D, device="cuda")
            state = torch.empty(B, H, D, D, device="cuda")
        x, query = self._input("x", given), self._input("q", q)
        self.k = compute(self.graph, x)
        self.k.meta["val"] = k
        operator = self.graph.call_function(linear_attention_forward, (query, self.k, query))
        results = [self.graph.call_function(getitem, (operator, i)) for i in (0, 1)]
        for node, t in zip(results, (q, state), strict=True):
            node.meta["val"] = t
        nodes = (results[0], self.k, results[1])
        output = self.graph.output(nodes)
        output.meta["user_visible_output_idxs"] = [0]
        output.meta["original_output_strides"] = [n.meta["val"].stride() for n in nodes]
        self.output = output

    def _input(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def settled(self) -> tuple[tuple[int, ...], ...]:
        """The strides of k and of the state, if they are settled."""
        assert kept.keep_layouts(self.graph) == 2
        assert self.output.meta["user_visible_output_idxs"] == [0, 1, 2]
        return tuple(self.output.meta["original_output_strides"][1:])


def of_image(graph: fx.Graph, x: fx.Node) -> fx.Node:
    view = graph.call_function(aten.view.default, (x, [B, H, D, N]))
    with FakeTensorMode():
        view.meta["val"] = torch.empty(B, H, D, N, device="cuda")
    return graph.call_function(aten.permute.default, (view, [0, 1, 3, 2]))


def after_gelu(graph: fx.Graph, x: fx.Node) -> fx.Node:
    y = graph.call_function(aten.gelu.default, (x,))
    y.meta["val"] = x.meta["val"]
    return of_image(graph, y)


def copied(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Of a softmax over the tokens, which its backward reads."""
    y = graph.call_function(aten._softmax.default, (x, -1, False))
    y.meta["val"] = x.meta["val"]
    view = graph.call_function(aten.permute.default, (y, [0, 1, 3, 2]))
    view.meta["val"] = x.meta["val"].permute(0, 1, 3, 2)
    return graph.call_function(aten.clone.default, (view,))


def without_the_batch(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Of a softmax, as the product of a batch of one takes it."""
    y = graph.call_function(aten._softmax.default, (x, -2, False))
    y.meta["val"] = x.meta["val"]
    return graph.call_function(aten.reshape.default, (y, [H, N, D]))


def tokens_first(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.permute.default, (x, [0, 2, 1, 3]))


def heads_of_image(x: Tensor) -> Tensor:
    return x.view(B, H, D, N).permute(0, 1, 3, 2)


def part_of_image(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """The second of three parts of the channels that a convolution writes."""
    y = graph.call_function(aten.convolution.default, (x, x))
    parts = graph.call_function(aten.split.Tensor, (y, C, 1))
    part = graph.call_function(getitem, (parts, 1))
    view = graph.call_function(aten.reshape.default, (part, [B, H, D, N]))
    with FakeTensorMode():
        y.meta["val"] = torch.empty(B, 3 * C, 4, N // 4, device="cuda")
    part.meta["val"] = y.meta["val"].narrow(1, C, C)
    view.meta["val"] = part.meta["val"].view(B, H, D, N)
    return graph.call_function(aten.permute.default, (view, [0, 1, 3, 2]))


STATE = (H * D * D, D * D, D, 1)


def test_an_image_is_kept_as_the_copy_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for last, strides in ((False, (C * N, N * D, D, 1)), (True, (C * N, D, C, 1))):
        monkeypatch.setattr(kept, "_lays_channels_last", lambda _, last=last: last)
        made = Kept((B, C, N), after_gelu, heads_of_image)
        assert made.settled() == (strides, STATE)


def test_what_was_copied_is_kept_as_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of a softmax reads it beside the gradient of the copy."""
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)
    made = Kept((B, H, D, N), copied, lambda x: torch.empty(B, H, N, D, device=x.device))
    source = made.k.args[0].args[0]
    output = made.output
    output.args = ((*output.args[0], source),)
    output.meta["original_output_strides"].append(source.meta["val"].stride())
    assert kept.keep_layouts(made.graph) == 3
    assert output.meta["original_output_strides"][-1] == (C * N, D * N, 1, D)


@pytest.mark.parametrize(
    ("shape", "heads_first", "one"),
    [
        ((1, H, N, D), lambda x: x.squeeze(0), 0),
        ((1, N, H, D), lambda x: x.permute(0, 2, 1, 3).squeeze(0), 0),
        ((H, N, 2 * D), lambda x: x.narrow(2, D, D), 1),
    ],
    ids=["heads", "tokens", "a part, one inside"],
)
def test_a_batch_of_one_is_kept_as_the_others(
    shape: tuple[int, ...],
    heads_first: Callable[[Tensor], Tensor],
    one: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bmm, and so the operator, has no such dim; what is kept has."""
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)
    made = Kept(shape, without_the_batch, heads_first)
    source, output = made.k.args[0], made.output
    source.meta["val"] = made.k.meta["val"].unsqueeze(one)
    output.args = ((*output.args[0], source),)
    output.meta["original_output_strides"].append(source.meta["val"].stride())
    assert kept.keep_layouts(made.graph) == 3
    strides = output.meta["original_output_strides"]
    own = made.k.meta["val"].stride()
    assert strides[1] == own
    assert tuple(s for d, s in enumerate(strides[-1]) if d != one) == own


def test_a_view_of_other_dims_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)

    def merged(graph: fx.Graph, x: fx.Node) -> fx.Node:
        y = graph.call_function(aten._softmax.default, (x, -2, False))
        y.meta["val"] = x.meta["val"]
        return graph.call_function(aten.reshape.default, (y, [B * H, N, D]))

    made = Kept((B, H, N, D), merged, lambda x: x.view(B * H, N, D))
    output = made.output
    output.args = ((*output.args[0], made.k.args[0]),)
    output.meta["original_output_strides"].append(())
    assert kept.keep_layouts(made.graph) == 2


def test_a_part_of_an_image_is_kept_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its views it is that is kept: autograd's strides would be those of a copy."""
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)
    made = Kept((B, C, N), part_of_image, lambda x: x.view(B, H, D, N).permute(0, 1, 3, 2))
    view = made.k.args[0]
    output = made.output
    output.args = ((*output.args[0], view, view.args[0]),)
    output.meta["original_output_strides"] += [n.meta["val"].stride() for n in (view, view.args[0])]
    made.k.meta["val"] = view.meta["val"].permute(0, 1, 3, 2)
    assert kept.keep_layouts(made.graph) == 4
    pixels = N * 3 * C
    assert output.meta["original_output_strides"][1:] == [
        (pixels, D, 3 * C, 1),
        STATE,
        (pixels, D, 1, 3 * C),
        (pixels, 1, N // 4 * 3 * C, 3 * C),
    ]


def test_an_input_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays alive: a copy that is kept would be memory more."""
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)
    made = Kept((B, C, N), of_image, heads_of_image)
    assert made.settled() == ((C * N, D * N, 1, N), STATE)


def test_what_the_kernels_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_lays_channels_last", lambda _: True)
    made = Kept((B, N, H, D), tokens_first, lambda x: x.permute(0, 2, 1, 3))
    assert made.settled() == ((C * N, D, C, 1), STATE)


@pytest.mark.parametrize("missing", ["user_visible_output_idxs", "original_output_strides"])
def test_without_a_place_for_it_nothing_changes(missing: str) -> None:
    made = Kept((B, C, N), after_gelu, heads_of_image)
    del made.output.meta[missing]
    before = dict(made.output.meta)
    assert kept.keep_layouts(made.graph) == 0
    assert made.output.meta == before


def test_what_goes_wrong_is_told_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fails(_: fx.Graph) -> bool:
        raise RuntimeError("no such attribute")

    monkeypatch.setattr(kept, "_lays_channels_last", fails)
    made = Kept((B, C, N), after_gelu, heads_of_image)
    before = dict(made.output.meta)
    assert kept.keep_layouts(made.graph) == 0
    assert made.output.meta == before
    assert "Inductor chooses the layout of what is kept for the backward" in caplog.text
