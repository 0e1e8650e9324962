"""Which products inside a graph are worth an operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import bla_inductor
from tests.compile.rewriting import Graphs, compiled, matched, tensors


def refusals(function, *args) -> list[str]:
    return [r.reason for r in bla_inductor.explain(function, *args).refusals]


def test_an_in_place_result_that_nobody_names_is_one_operator() -> None:
    def model(q, k, v):
        out = q @ (k.mT @ v)
        out.div_(q @ k.sum(-2).unsqueeze(-1) + 30.0)
        return out

    graphs = Graphs()
    args = tensors(grad=False)
    ours = torch.compile(model, backend=graphs)(*args)
    torch.testing.assert_close(ours, model(*args))
    assert sum("bla.linear_attention" in t for t in graphs.targets()) == 1
    assert not any("div" in t for t in graphs.targets())


def test_a_state_that_is_read_elsewhere_is_not_computed_twice() -> None:
    def model(q, k, v):
        state = k.mT @ v
        return q @ state, state

    args = tensors(grad=False)
    compiled(model)(*args)
    assert matched() == 0
    assert any("computed twice" in reason for reason in refusals(model, *args))


def test_scores_that_are_read_elsewhere_are_not_computed_twice() -> None:
    def model(q, k, v):
        scores = F.relu(q) @ F.relu(k).mT
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
        return scores @ v, scores

    args = tensors(grad=False)
    compiled(model)(*args)
    assert matched() == 0


def test_a_numerator_that_is_read_elsewhere_is_replaced_alone() -> None:
    def model(q, k, v):
        out = q @ (k.mT @ v)
        return out / (q @ k.sum(-2).unsqueeze(-1) + 30.0), out

    graphs = Graphs()
    args = tensors(grad=False)
    ours = torch.compile(model, backend=graphs)(*args)
    torch.testing.assert_close(ours, model(*args))
    assert sum("bla.linear_attention" in t for t in graphs.targets()) == 1


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, a, b: x @ a @ b, [(2, 64, 32), (32, 4), (4, 32)]),  # LoRA as a function
        (lambda x, a, b: x @ (a @ b), [(64, 32), (32, 4), (4, 32)]),
        (lambda a, x, w: a @ x @ w, [(30, 30), (30, 16), (16, 8)]),  # graph convolution
        (lambda k, r, p: k @ r @ p, [(2, 3, 3), (2, 3, 3), (2, 3, 3)]),  # camera matrices
    ],
)
def test_a_chain_of_matrices_without_a_long_axis_is_left_alone(function, shapes) -> None:
    args = tensors(*shapes, grad=False)
    torch.testing.assert_close(compiled(function)(*args), function(*args))
    assert matched() == 0
    assert any("no long axis" in reason for reason in refusals(function, *args))


def test_matrices_on_either_side_of_blocks_are_left_alone() -> None:
    """The DCT of 8 × 8 blocks: a matrix behind all blocks is a projection of them."""

    def dct(c, x, d):
        return c @ x @ d.mT

    args = tensors((8, 8), (5, 8, 8), (8, 8), grad=False)
    torch.testing.assert_close(compiled(dct)(*args), dct(*args))
    assert matched() == 0
    assert refusals(dct, *args) == []


def test_always_overrides_the_cost_model() -> None:
    args = tensors((2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 8, 16), grad=False)

    def model(q, k, v):
        return q @ (k.mT @ v)

    options = {"inner": "aot_eager", "rewrite": "always"}
    counters.clear()
    run = torch.compile(model, backend="bla", options=options)
    torch.testing.assert_close(run(*args), model(*args))
    assert matched() == 1


def test_a_normaliser_over_keys_that_are_as_many_by_chance() -> None:
    """With the first lengths they are as many as the numerator's, with the second they are not."""

    def model(q, k, v, others):
        others = torch.cat((others, q), -2)
        return q @ (k.mT @ v) / (q @ others.sum(-2).unsqueeze(-1) + 100)

    run = compiled(model, dynamic=True)
    for n, m, extra in ((20, 30, 10), (20, 30, 15)):
        args = tensors((2, 3, n, 8), (2, 3, m, 8), (2, 3, m, 8), (2, 3, extra, 8), grad=False)
        torch.testing.assert_close(run(*args), model(*args))
    assert counters["bla"]["graphs"] == 1
    assert matched() == 1  # the numerator
