"""Gradients of q, k, v that autograd joins again: one result of the backward operator, the same
values, and no pass that copies them together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import fx

from bla_inductor import lowering
from bla_inductor.copies import remove_copies
from bla_inductor.ops.packed import linear_attention_backward_packed, written_into
from bla_inductor.packing import pack_gradients
from tests.compile import test_codegen

bla = torch.ops.bla
B, N, H, D = 2, 24, 3, 8
FORMULA: dict[str, Any] = {"q_map": "x**2 + 0.1", "k_map": "x**2 + 0.1", "normalizer": "add"}


def attention(q, k, v):
    return bla.linear_attention(q, k, v, **FORMULA).transpose(1, 2).flatten(2)


def by_unbind(x):
    return attention(*x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0))


def by_chunk(x):
    return attention(*(t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.chunk(3, -1)))


def by_index(x):
    t = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    return attention(t[0], t[1], t[2])


def by_slices(x):
    t = x.unflatten(-1, (H, 3 * D)).transpose(1, 2)
    return attention(t[..., :D], t[..., D : 2 * D], t[..., 2 * D :])


def of_images(x):
    t = x.transpose(1, 2).unflatten(1, (H, 3 * D))
    return attention(*(part.transpose(-1, -2) for part in t.chunk(3, 2)))


def swapped(x):
    q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(v, q, k)


def keys_and_values(x):
    """Two of three: dq is a result of its own."""
    q, kv = x[..., : H * D], x[..., H * D :].contiguous()
    k, v = kv.unflatten(-1, (2, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q.unflatten(-1, (H, D)).transpose(1, 2), k, v)


def read_elsewhere(x):
    q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v) + k.transpose(1, 2).flatten(2)


def with_a_part_that_is_not_ours(x):
    q, k, v, other = x.unflatten(-1, (-1, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v) + other.transpose(1, 2).flatten(2)


def overlapping(x):
    t = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    return attention(t[0], t[1], t[1])


def one_headed(x):
    q, k, v = x.unflatten(-1, (3 * H, D)).transpose(1, 2).split([3 * H - 2, 1, 1], 1)
    return attention(q, k, v)


JOINED = [by_unbind, by_chunk, by_index, by_slices, of_images, swapped, keys_and_values]
LEFT = [read_elsewhere, with_a_part_that_is_not_ours, overlapping, one_headed]


def gradients(
    function: Callable[..., Any], x: torch.Tensor, rewrite: Callable[..., int] = pack_gradients
) -> tuple[Any, Any, fx.Graph, int]:
    """The gradient of x before and after the pass, the graph, and how much was rewritten."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    ours = set(lowering._OURS)
    table = {op: f for op, f in select_decomp_table().items() if op not in ours}
    seen: dict[str, Any] = {}

    def backward(gm: fx.GraphModule, inputs: Any) -> Any:
        seen["graph module"] = gm

        def run(*args: Any) -> Any:
            seen["args"] = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            return gm(*args)

        return make_boxed_func(run)

    compiled = aot_function(
        function,
        fw_compiler=lambda gm, _: make_boxed_func(gm),
        bw_compiler=backward,
        decompositions=table,
    )
    leaf = x.detach().requires_grad_()
    compiled(leaf).square().sum().backward()
    gm = seen["graph module"]
    view_to_reshape(gm)  # as Inductor has them, which changes strides
    count = rewrite(gm.graph, device_type="cpu")
    gm.recompile()
    (packed, *_) = gm(*seen["args"])
    return leaf.grad, packed, gm.graph, count


def example(function: Callable[..., Any]) -> torch.Tensor:
    parts = 4 if function is with_a_part_that_is_not_ours else 3
    return torch.randn(B, N, parts * H * D)


@pytest.mark.parametrize("function", JOINED, ids=lambda f: f.__name__)
def test_joined_gradients_become_one_result(function: Callable[..., Any]) -> None:
    before, after, graph, count = gradients(function, example(function))
    assert count == 1
    targets = [node.target for node in graph.nodes]
    assert targets.count(linear_attention_backward_packed) == 1
    assert torch.ops.aten.select_scatter.default not in targets
    assert targets.count(torch.ops.aten.cat.default) == 0
    assert torch.equal(before, after)


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_is_no_join_of_all_its_parts_is_left(function: Callable[..., Any]) -> None:
    before, after, graph, count = gradients(function, example(function))
    assert count == 0
    assert linear_attention_backward_packed not in [node.target for node in graph.nodes]
    assert torch.equal(before, after)


def projected(x, parts: int):
    w = torch.linspace(-40, 40, 7 * parts * H * D).sin().view(7, -1)
    return [t.unflatten(-1, (H, D)).transpose(1, 2) for t in (x @ w).chunk(parts, -1)]


def softmax_of_the_keys(x):
    q, k, v = projected(x, 3)
    return attention(q, k.softmax(-2), v)


def rotated(x):
    """Only dv is written by the kernels where it ends up."""
    q, k, v = projected(x, 3)
    return attention(q * 2 - q.roll(1, -1), k.roll(1, -1) + k, v)


def with_parts_that_are_not_ours(x):
    q, a, k, v, b = projected(x, 5)
    return attention(q, k, v) + (a * b).transpose(1, 2).flatten(2)


def partly(graph: fx.Graph, device_type: str) -> int:
    assert pack_gradients(graph, device_type) == 0
    remove_copies(graph, device_type)
    return pack_gradients(graph, device_type, partly=True)


@pytest.mark.parametrize(
    ("function", "ours"),
    [(softmax_of_the_keys, 2), (rotated, 1), (with_parts_that_are_not_ours, 3)],
)
def test_joined_with_others_they_are_written_there(function: Callable[..., Any], ours: int) -> None:
    before, after, graph, count = gradients(function, torch.randn(B, N, 7), partly)
    assert count == 1
    (packed,) = graph.find_nodes(op="call_function", target=linear_attention_backward_packed)
    assert len(packed.kwargs["places"]) == ours * (2 + 4)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    torch.testing.assert_close(after, before)


def test_what_a_loop_reads_is_not_joined_in_memory() -> None:
    """Inductor would compute the others where they are read."""

    def function(x):
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.sin().chunk(3, -1))
        return attention(q, k.softmax(-2), v)

    before, after, _, count = gradients(function, torch.randn(B, N, 3 * H * D), partly)
    assert count == 0
    assert torch.equal(before, after)


def test_a_failure_of_the_pass_leaves_the_graph(monkeypatch, caplog) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    monkeypatch.setattr("bla_inductor.packing._part", fail)
    with caplog.at_level(logging.WARNING, logger="bla_inductor"):
        before, after, _, count = gradients(by_unbind, example(by_unbind))
    assert count == 0
    assert torch.equal(before, after)
    assert "joined by a copy" in caplog.text


def joined_by_stack(q, k, v, do):
    grads = test_codegen.gradients(q, k, v, do)
    return torch.stack(grads).permute(1, 3, 0, 2, 4).flatten(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="imagines a device where there is none")
@pytest.mark.parametrize(("n", "kernels"), [(4096, 5), (128, 2)])
def test_the_kernels_write_into_the_joined_buffer(n: int, kernels: int) -> None:
    """No kernel for the join, and no buffer for a part."""
    pytest.importorskip("triton")
    lowering.register()
    shape = test_codegen.heads(n)
    text = test_codegen.code(joined_by_stack, *[shape] * 4)
    test_codegen.assert_fused(text, kernels)
    assert f"empty_strided_cuda({shape}" not in text.split("def call", 1)[1].replace(", )", ")")


def joined_behind_a_softmax(q, k, v, do):
    dq, dk, dv = test_codegen.gradients(q, k, v, do)
    parts = [t.transpose(1, 2).flatten(2) for t in (dq, dk * k.exp() - k, dv)]
    joined = torch.cat(parts, -1).flatten(0, 1)
    return joined @ do.new_ones(joined.shape[1], 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="imagines a device where there is none")
def test_what_is_joined_with_others_is_not_copied() -> None:
    """One loop, which computes dk and writes it into the joined buffer and nowhere else."""
    pytest.importorskip("triton")
    lowering.register()
    shape = test_codegen.heads(4096)
    text = test_codegen.code(joined_behind_a_softmax, *[shape] * 4)
    calls = text.split("def call", 1)[1]
    assert calls.count(f"empty_strided_cuda({shape}") == 1  # dk, before it goes on
    (loop,) = [line for line in calls.splitlines() if "triton_poi" in line and "arg1_1" in line]
    assert loop.count("buf") == 2, loop


def test_writing_into_a_tensor_changes_the_result_alone() -> None:
    joined, part = torch.zeros(2, 9), torch.ones(2, 3)
    result = written_into(joined, part, 1, 4)
    assert not joined.any()
    assert result.sum(0).tolist() == [0, 0, 0, 0, 2, 2, 2, 0, 0]
    torch.library.opcheck(written_into, (joined, part, 1, 4))
