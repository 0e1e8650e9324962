"""A failure of bla's, wherever it happens, costs the speed-up and nothing else: the graph is the
user's, there is one warning, and no global state has changed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch.utils.checkpoint import checkpoint

from bla_inductor import backend, compat, failures, lowering, packing, stamp, undo
from bla_inductor.options import Options
from tests.compile.test_packing import by_unbind, example, gradients

PISA = {
    "approximate": {"pisa": {"density": 0.1, "block_size": 16}},
    "approximate_training": True,
    "rewrite": "always",
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first is a leaf of the second; a cast region, in-place operators and random numbers."""
    x = attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        x = attention(q, k, x.sin())
    return x.clone().add_(1).mul_(torch.rand_like(x))


def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, checkpoint(attention, q, k, v, use_reentrant=False))


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def unmatched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).cos() @ v


@pytest.fixture(autouse=True)
def _untold() -> None:
    failures.forget()


class Stage:
    """Raise in the `call`-th call of the function at `path`, a module and the attributes in it."""

    def __init__(
        self, path: str, call: int = 1, program: Callable[..., Tensor] = twice, **options: Any
    ) -> None:
        self.path, self.call, self.program, self.options = path, call, program, options

    def __str__(self) -> str:
        return f"{self.path}-{self.call}"


STAGES = [
    Stage("bla_inductor.rewrite:observe"),
    Stage("bla_inductor.algebra.observe:_Walk._run", 4),
    Stage("bla_inductor.algebra.observe:_Walk._run", 20),  # in the autocast region
    Stage("bla_inductor.algebra.observer:Observer.name", 9),
    Stage("bla_inductor.algebra.observer:Observer.from_record", 3),
    Stage("bla_inductor.rewrite:_rename_written"),
    Stage("bla_inductor.rewrite:select"),
    Stage("bla_inductor.select:Catalogue.find"),
    Stage("bla_inductor.select:match", 1),
    Stage("bla_inductor.select:match", 7),
    Stage("bla_inductor.plan:gather", 2),
    Stage("bla_inductor.select:Plan.make", 1),
    Stage("bla_inductor.select:decide", 2),
    Stage("bla_inductor.emit:Emitter.call", 1),
    Stage("bla_inductor.emit:Emitter.call", 4),
    Stage("bla_inductor.select:locate", 1),
    Stage("bla_inductor.rewrite:nearest", 1, unmatched),
    Stage("bla_inductor.rewrite:approximate", 1, softmax, **PISA),
    Stage("bla_inductor.approximate:Match", 1, softmax, **PISA),
    Stage("bla_inductor.approximate:_Site.emit", 1, softmax, **PISA),
    Stage("bla_inductor.rewrite:decide", 1),
    Stage("bla_inductor.rewrite:formula", 2),
    Stage("bla_inductor.rewrite:Match", 2),
    # half-way through the surgery
    Stage("bla_inductor.rewrite:_keep_gradient", 2),
    Stage("torch.fx:Node.replace_all_uses_with", 1),
    Stage("torch.fx:Node.replace_all_uses_with", 3),
    Stage("bla_inductor.rewrite:_erase_dead", 1),
    Stage("torch.fx:Graph.erase_node", 1),
    Stage("torch.fx:Graph.erase_node", 9),
    Stage("torch.fx:Graph.lint", 1),
    # the graph around the checkpoint is finished by then
    Stage("bla_inductor.rewrite:observe", 2, nested),
    Stage("torch.fx:Graph.erase_node", 9, nested),
    Stage("torch.fx:Graph.lint", 2, nested),
]


class Injected(Exception):
    pass


@contextmanager
def failing(path: str, call: int) -> Iterator[list[int]]:
    """Inside, the function fails once, after it has disturbed all that it can reach."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = names.split(".")
    for part in owners:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return whole(*args, **kwargs)
        torch.rand(3)
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_autocast_enabled("cpu", not torch.is_autocast_enabled("cpu"))
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.autocast_increment_nesting()
        raise Injected("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fails)
        yield calls


def state() -> dict[str, Any]:
    context = TracingContext.try_get()
    shapes = context.fake_mode.shape_env if context and context.fake_mode else None
    nesting = (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast nesting": nesting,
        "default dtype": torch.get_default_dtype(),
        "random numbers": torch.get_rng_state().tolist(),
        "guards": len(shapes.guards) if shapes else 0,
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


def text(gm: fx.GraphModule) -> list[Any]:
    """All that a graph says, its nested graphs too."""
    graphs = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [
        (
            m.code,
            [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in m.graph.nodes],
            [n.meta.get("stack_trace") for n in m.graph.nodes],
            [id(n.meta.get("example_value")) for n in m.graph.nodes],
            [{u.name for u in n.users} for n in m.graph.nodes],
        )
        for m in graphs
    ]


class Compared:
    """The backend between two looks at everything that it may not change."""

    def __init__(self, stage: Stage, **options: Any) -> None:
        self.stage, self.options = stage, {"inner": "eager", **stage.options, **options}
        self.calls: list[int] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph, before = text(gm), state()
        try:
            with failing(self.stage.path, self.stage.call) as calls:
                return backend.bla(gm, inputs, options=self.options)
        finally:
            self.calls += calls
            assert state() == before
            assert text(gm) == graph
            gm.graph.lint()


def warnings(caplog: Any) -> list[logging.LogRecord]:
    ours = [r for r in caplog.records if r.name.startswith("bla_inductor")]
    return [r for r in ours if r.levelno >= logging.WARNING]


def inputs() -> list[Tensor]:
    return [x.requires_grad_() for x in torch.rand(3, 2, 2, 256, 16).unbind()]


def results(function: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    leaves = inputs()
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_failure_anywhere_leaves_everything_as_it_was(stage: Stage, caplog: Any) -> None:
    compared = Compared(stage)
    expected = results(stage.program)
    got = results(torch.compile(stage.program, backend=compared, dynamic=True, fullgraph=True))
    assert len(compared.calls) >= stage.call, "the failure was not injected"
    torch.testing.assert_close(got, expected)
    (warning,) = warnings(caplog)
    told = warning.getMessage()
    assert "Injected: on purpose" in told
    assert "compiled as it was written" in told
    assert "Please report it" in told
    assert " at " in told
    assert ".py:" in told


@pytest.mark.parametrize("stage", STAGES[::6], ids=str)
def test_strict_raises_it_and_leaves_the_graph_as_well(stage: Stage) -> None:
    compared = Compared(stage, strict=True)
    with pytest.raises(BackendCompilerFailed, match="Injected: on purpose"):
        torch.compile(stage.program, backend=compared, dynamic=True)(*inputs())


def test_without_a_failure_the_graph_is_another() -> None:
    """Or the tests above would show nothing."""
    never = Stage("bla_inductor.rewrite:observe", 10**6)
    for program in (twice, nested):
        with pytest.raises(BackendCompilerFailed, match="AssertionError"):
            torch.compile(program, backend=Compared(never), dynamic=True)(*inputs())


def test_the_same_failure_is_told_once_until_reset(caplog: Any) -> None:
    stage = Stage("bla_inductor.rewrite:select")
    for _ in range(2):
        torch.compile(twice, backend=Compared(stage))(*inputs())
    assert len(warnings(caplog)) == 1
    torch._dynamo.reset()
    failures.forget()
    torch.compile(twice, backend=Compared(stage))(*inputs())
    assert len(warnings(caplog)) == 2


def test_reset_forgets_what_was_told(monkeypatch: Any) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(failures, "forget", lambda: forgotten.append(1))
    backend.bla.reset()
    assert forgotten


def test_lowerings_that_cannot_be_registered(caplog: Any, monkeypatch: Any) -> None:
    """Inductor would not know the operators, so none is put into the graph."""
    monkeypatch.setattr(lowering, "register", _raises)
    gm = fx.symbolic_trace(attention)
    before = text(gm)
    report = backend.rewrite_or_leave(gm, inputs(), Options())
    assert report.matches == []
    assert text(gm) == before
    assert len(warnings(caplog)) == 1


def test_a_registration_that_failed_half_way_is_taken_up_again(monkeypatch: Any) -> None:
    from torch._inductor import decomposition

    table = {torch.ops.bla.linear_attention.default: 1, torch.ops.aten.sin.default: 2}
    known = dict(decomposition.decompositions)
    known.pop(torch.ops.bla.linear_attention.default, None)
    known.pop(torch.ops.aten.sin.default, None)
    made: list[Any] = []

    def register(ops: list[Any]) -> Callable[[Any], None]:
        assert ops[0] not in known, "torch takes no operator twice"
        if len(made) == 1:
            made.append(None)
            raise Injected("on purpose")
        known[ops[0]] = made.append(ops[0])
        return lambda function: None

    monkeypatch.setattr(decomposition, "decompositions", known)
    monkeypatch.setattr(decomposition, "register_decomposition", register)
    with pytest.raises(Injected):
        compat.register_decompositions(table)
    compat.register_decompositions(table)
    assert set(table) <= set(known)


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise Injected("on purpose")


@pytest.mark.parametrize("path", ["backend:announce", "report:Report.summary"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_report_that_cannot_be_told(path: str, strict: bool, caplog: Any) -> None:
    run = torch.compile(attention, backend="bla", options={"inner": "eager", "strict": strict})
    with failing(f"bla_inductor.{path}", 1) as calls, torch.random.fork_rng():
        if strict:
            with pytest.raises(BackendCompilerFailed, match="on purpose"):
                run(*inputs())
        else:
            torch.testing.assert_close(run(*inputs()).shape, attention(*inputs()).shape)
    assert calls
    assert len(warnings(caplog)) == (not strict)
    torch.set_autocast_enabled("cpu", False)
    torch.set_grad_enabled(True)
    torch.autocast_decrement_nesting()


PACKING = [("_pack", 1), ("_part", 2), ("_end_and_places", 1), ("_rewrite", 1), ("value", 12)]


@pytest.mark.parametrize(("name", "call"), PACKING)
@pytest.mark.parametrize("late", [False, True])
def test_packing_leaves_the_graph(name: str, call: int, late: bool, caplog: Any) -> None:
    """late: after the function has done its work, which is worse."""
    whole, calls = getattr(packing, name), []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return whole(*args)
        if late:
            whole(*args)
        raise Injected("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, name, fails)
        before, after, graph, count = gradients(by_unbind, example(by_unbind))
    assert len(calls) >= call
    assert count == 0
    assert torch.equal(before, after)
    assert packing.linear_attention_backward_packed not in [n.target for n in graph.nodes]
    assert packing.linear_attention_backward in [n.target for n in graph.nodes]
    assert len(warnings(caplog)) == 1


def test_without_readable_sources_nothing_comes_from_a_cache(monkeypatch: Any, caplog: Any) -> None:
    def unreadable() -> str:
        raise PermissionError("sources")

    made = stamp.CacheStamp(Options())
    assert made.uuid() is not None
    monkeypatch.setattr(stamp, "source_hash", unreadable)
    assert made.uuid() is None
    assert len(warnings(caplog)) == 1


def test_a_snapshot_brings_back_names_order_and_metadata() -> None:
    gm = fx.symbolic_trace(attention)
    for i, node in enumerate(gm.graph.nodes):
        node.meta["number"] = i
    before, numbers = text(gm), [n.meta["number"] for n in gm.graph.nodes]
    snapshot = undo.Snapshot(gm.graph)
    *_, division, output = gm.graph.nodes
    with gm.graph.inserting_before(division):
        other = gm.graph.call_function(torch.sin, (division.args[0],))
    other.append(next(iter(gm.graph.find_nodes(op="call_method", target="relu"))))
    output.args = (other,)
    for dead in (division, *division.args[1:]):
        gm.graph.erase_node(dead)
    other.meta["number"] = -1
    next(iter(gm.graph.nodes)).meta.clear()
    assert text(gm)[0][1] != before[0][1]
    snapshot.restore()
    gm.recompile()
    assert text(gm) == before
    assert [n.meta["number"] for n in gm.graph.nodes] == numbers
    gm.graph.lint()
