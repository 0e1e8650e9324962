"""Second derivatives through a compiled graph: AOTAutograd has none, and the error is ours.

It says where and what to do, and nothing else is changed: not the first derivatives, recorded or
not, not compiled autograd, and not what stays in memory.
"""

from __future__ import annotations

import ast
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bla_inductor import BlaDoubleBackwardError, Report, double_backward
from bla_inductor.report import Location, Match
from tests.counted import counted

Function = Callable[..., Tensor]

AT = Location("model.py", 7, "forward", "return q @ state")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """AOTAutograd makes each anew from one tensor."""
    out = attention(q, k, v).sin()
    return out.flatten(), out.mT


def several(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """With a number, a tensor without gradient, an input and one that nobody uses."""
    return 3, v.detach() + 1, q, attention(k, q, v), attention(q, k, v)


def last(function: Callable[..., Any]) -> Function:
    return lambda *args: function(*args)[-1]


def around(function: Function) -> Function:
    return lambda *args: checkpoint(function, *args, use_reentrant=False)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.rand(2, 2, 9, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.requires_grad_() for x in made]


def compiled(function: Callable[..., Any], inner: str = "aot_eager", **options: Any) -> Any:
    options = {"inner": inner, "rewrite": "always", **options}
    return torch.compile(function, backend="bla", options=options)


def first(function: Function, create_graph: bool = False) -> tuple[list[Tensor], Any]:
    leaves = inputs()
    loss = function(*leaves).square().sum()
    return leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph)


def second(function: Function) -> tuple[Tensor, ...]:
    leaves, gradients = first(function, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


WAYS: dict[str, Callable[[], Function]] = {
    "plain": lambda: compiled(attention),
    "views": lambda: last(compiled(views)),
    "several results": lambda: last(compiled(several)),
    "checkpoint around": lambda: around(compiled(attention)),
    "checkpoint inside": lambda: compiled(around(attention)),
    "verified": lambda: compiled(attention, verify="always"),
}


@pytest.fixture
def recorded_after_first_order():
    """AOTAutograd refuses create_graph of a graph whose backward was compiled without."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@pytest.mark.usefixtures("recorded_after_first_order")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_error_takes_the_place_of_torchs(way: Callable[[], Function]) -> None:
    run = way()
    for _ in range(2):
        with pytest.raises(BlaDoubleBackwardError, match="does not currently support double"):
            second(run)


@pytest.mark.slow
def test_inductor() -> None:
    with pytest.raises(BlaDoubleBackwardError):
        second(compiled(attention, "inductor"))


def test_the_error_names_the_place_and_what_to_do_works() -> None:
    with pytest.raises(BlaDoubleBackwardError) as caught:
        second(compiled(attention))
    line = inspect.getsourcelines(attention)[1] + 2
    told = str(caught.value)
    assert f"the attention at {__file__}:{line}; torch.compile" in told
    assert [match.location.line for match in caught.value.report.matches] == [line]
    options = ast.literal_eval(re.search(r"Compile with options=(\{.*?\})", told)[1])
    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(second(compiled(attention, **options)), second(attention))
    assert counted()["matched"] == 1


def test_the_text_of_the_error() -> None:
    one = Match("linear attention", "QKV", "N=9", "float32", AT)
    approximate = Match("attention", "QKV", "N=9", "float32", AT, approximate="0.1 of the blocks")
    start = (
        "a second derivative was asked of the compiled graph with the attention at model.py:7{}; "
        "torch.compile with aot_autograd does not currently support double backward. "
        "Compile with options={{'inner': 'eager'}}"
    )
    error = BlaDoubleBackwardError(Report([one]))
    told = ": the attention is fused there as well, and twice differentiable."
    assert str(error) == start.format("") + told
    assert isinstance(error, RuntimeError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    error = BlaDoubleBackwardError(Report([one, approximate]))
    told = " and without 'approximate', which has none either."
    assert str(error) == start.format(" and others") + told


def test_where_nothing_was_rewritten_the_error_is_torchs() -> None:
    with pytest.raises(RuntimeError, match="does not currently support double") as caught:
        second(compiled(attention, rewrite="off"))
    assert not isinstance(caught.value, BlaDoubleBackwardError)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="its AOTAutograd records no backward through two graphs"
)
def test_the_graph_before_keeps_its_own_error() -> None:
    """Its result is an input of the rewritten graph, which returns it before its own."""
    before = compiled(lambda q: q.sin(), rewrite="off")
    q, k, v = inputs()
    made = before(q)

    def graph(*args: Tensor) -> tuple[Tensor, ...]:
        return made, made.mT, run(*args)

    run = torch.compile(attention, backend="aot_eager")
    report = Report([Match("linear attention", "QKV", "N=9", "float32", AT)])
    out = double_backward.refused(graph, [made, k, v], report)(made, k, v)[-1]
    (gradient,) = torch.autograd.grad(out.sum(), k, create_graph=True)
    with pytest.raises(BlaDoubleBackwardError, match=r"model\.py:7"):
        gradient.sum().backward(retain_graph=True)
    (gradient,) = torch.autograd.grad(made.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double") as caught:
        gradient.sum().backward()
    assert not isinstance(caught.value, BlaDoubleBackwardError)


@pytest.mark.usefixtures("recorded_after_first_order")
@pytest.mark.parametrize("create_graph", [True, False])
def test_first_derivatives(create_graph: bool) -> None:
    run = compiled(attention)
    for _ in range(2):
        _, gradients = first(run, create_graph)
        assert all(g.requires_grad == create_graph for g in gradients)
        torch.testing.assert_close(gradients, first(attention, create_graph)[1])


def test_compiled_autograd_with_a_result_that_is_not_used() -> None:
    """It fails on a hook of the graph's node: an unused result has no gradient to call it with."""
    run = compiled(several)
    counters.clear()
    for _ in range(2):
        leaves = inputs()
        loss = run(*leaves)[-1].square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([x.grad for x in leaves], list(first(attention)[1]))
    assert counters["compiled_autograd"]["captures"] == 1


def test_nothing_is_kept() -> None:
    """Neither by a reference nor by a cycle of them."""
    run = compiled(attention)
    first(run)
    gc.collect()
    gc.disable()
    try:
        leaves = inputs()
        out = run(*leaves)
        incoming = torch.ones_like(out)
        gradients = torch.autograd.grad(out, leaves, incoming)
        kept = [weakref.ref(x) for x in (*leaves, out, incoming, *gradients, out.grad_fn)]
        del leaves, out, incoming, gradients
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_calls_that_have_no_gradient_are_those_of_the_compiled_graph() -> None:
    def graph(*args: Tensor) -> tuple[Tensor, ...]:
        return args

    report = Report([Match("linear attention", "QKV", "N=9", "float32", AT)])
    assert double_backward.refused(graph, inputs(), report) is not graph
    assert double_backward.refused(graph, inputs(), Report()) is graph
    assert double_backward.refused(graph, [x.detach() for x in inputs()], report) is graph
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert double_backward.refused(graph, inputs(), report) is graph
