"""Failures after the analysis: in a lowering, and in what Inductor makes of a template later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters

from bla_inductor import failures, falling_back, lowering, lowering_cuda
from tests.compile import nogpu

bla = torch.ops.bla
imagined = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    pytest.importorskip("triton")
    lowering.register()
    lowering_cuda._reported.clear()
    failures.forget()
    yield
    lowering_cuda._reported.clear()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return bla.linear_attention(q, k, v, normalizer="add", eps=1e-6).sin()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def long(make: nogpu.Make) -> list[Tensor]:
    return [make.tensor(2, 4, 4096, 64, dtype=torch.bfloat16) for _ in range(3)]


def warnings(caplog: Any) -> list[logging.LogRecord]:
    ours = [r for r in caplog.records if r.name.startswith("bla_inductor")]
    return [r for r in ours if r.levelno >= logging.WARNING]


def raising(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("on purpose")


@imagined
@pytest.mark.parametrize("path", ["forward.bound", "forward.statistics", "forward.apply_state"])
def test_a_lowering_that_fails_becomes_a_call(path: str, monkeypatch: Any, caplog: Any) -> None:
    """Also where two of its three kernels are in Inductor's graph already: they are dropped."""
    assert "torch.ops.bla" not in nogpu.code(attention, long)
    with monkeypatch.context() as patch:
        patch.setattr(f"bla_inductor.templates.{path}", raising)
        for _ in range(2):
            text = nogpu.code(attention, long)
            assert "torch.ops.bla.linear_attention" in text
            assert text.count(".run(") == 1  # the sine
            assert not any("tem" in name for name in nogpu.kernels(text))
    (warning,) = warnings(caplog)
    assert "called instead of fused" in warning.getMessage()
    assert "ZeroDivisionError: on purpose" in warning.getMessage()
    assert "Please report it" in warning.getMessage()


@imagined
def test_calls_only() -> None:
    with lowering_cuda.calls_only():
        text = nogpu.code(attention, long)
    assert "torch.ops.bla.linear_attention" in text
    assert not any("tem" in name for name in nogpu.kernels(text))
    assert "torch.ops.bla" not in nogpu.code(attention, long)


class Inductor:
    """Stands for the function that compiles one graph; fails on the calls in `failing`."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.calls, self.with_calls = failing, 0, []

    def __call__(self, gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> str:
        self.calls += 1
        self.with_calls.append(lowering_cuda._calls.get())
        self.code, self.kwargs = gm.code, kwargs
        output = next(iter(gm.graph.find_nodes(op="output")))
        with gm.graph.inserting_before(output):  # as its passes do
            node = gm.graph.call_function(torch.cos, (output.args[0],))
        output.args = (node,)
        gm.recompile()
        if self.calls in self.failing:
            raise RuntimeError(f"failure {self.calls}")
        return "compiled"


def graph(device: str = "cuda") -> fx.GraphModule:
    gm = fx.symbolic_trace(attention)
    mode = torch._subclasses.FakeTensorMode()
    for node in gm.graph.find_nodes(op="placeholder"):
        with mode:
            node.meta["val"] = torch.empty(2, 9, 4, device=device)
    (call,) = gm.graph.find_nodes(op="call_function", target=bla.linear_attention)
    call.target = bla.linear_attention.default
    gm.recompile()
    return gm


def test_what_fails_with_templates_is_compiled_with_calls(caplog: Any) -> None:
    one, gm = Inductor(1), graph()
    before = gm.code
    assert falling_back.falling_back(one)(gm, [], is_backward=True) == "compiled"
    assert one.with_calls == [False, True]
    assert one.code == before, "the second try should see the graph as it was"
    assert one.kwargs == {"is_backward": True}
    assert not lowering_cuda._calls.get()
    (warning,) = warnings(caplog)
    assert "RuntimeError: failure 1" in warning.getMessage()
    assert "called instead of fused" in warning.getMessage()


def test_what_fails_either_way_is_raised_as_it_was(caplog: Any) -> None:
    one = Inductor(1, 2)
    with pytest.raises(RuntimeError, match="failure 1"):
        falling_back.falling_back(one)(graph(), [])
    assert one.calls == 2
    assert warnings(caplog) == []


@pytest.mark.parametrize("gm", [graph("cpu"), fx.symbolic_trace(plain)], ids=["cpu", "not ours"])
def test_graphs_without_templates_are_tried_once(gm: fx.GraphModule, caplog: Any) -> None:
    one = Inductor(1)
    with pytest.raises(RuntimeError, match="failure 1"):
        falling_back.falling_back(one)(gm, [])
    assert one.calls == 1
    assert warnings(caplog) == []


def test_operators_in_nested_graphs_are_found() -> None:
    outer = fx.symbolic_trace(plain)
    outer.add_submodule("body", graph())
    assert falling_back._holds_operators(outer, "cuda")
    assert not falling_back._holds_operators(graph("cpu"), "cuda")


@pytest.mark.slow
def test_through_inductor(monkeypatch: Any, caplog: Any, tmp_path: Any) -> None:
    """On a CPU, where nothing of ours fails: Inductor's own function does, after its passes. What
    was compiled the second time is not in its cache.
    """
    from torch._inductor import compile_fx

    whole: Callable[..., Any] = compile_fx.compile_fx_inner
    tries: list[bool] = []

    def fails_without_calls(*args: Any, **kwargs: Any) -> Any:
        made = whole(*args, **kwargs)
        tries.append(lowering_cuda._calls.get())
        if not tries[-1]:
            raise RuntimeError(f"failure {len(tries)}")
        return made

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails_without_calls)
    monkeypatch.setattr(falling_back, "_holds_operators", lambda gm, device=None: True)
    leaves = [torch.rand(1, 2, 128, 16, requires_grad=True) for _ in range(3)]
    out = torch.compile(plain, backend="bla")(*leaves)
    got = torch.autograd.grad(out.square().sum(), leaves)
    expected = plain(*leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), leaves))
    assert tries == [False, True, False, True]
    assert len(warnings(caplog)) == 2  # one for each graph: the causes are not the same
    assert counters["bla"]["matched"] == 1
    assert counters["aot_autograd"]["autograd_cache_saved"] == 0
