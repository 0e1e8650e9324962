"""`explain(model, *args)`: the report of a compilation without the compilation.

Dynamo traces the call, each graph is analysed as the backend would, and the graph that Dynamo made
runs eagerly. Nothing goes to AOTAutograd or Inductor.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from bla_inductor.compat import isolated
from bla_inductor.options import Options
from bla_inductor.report import Location, Report
from bla_inductor.rewrite import rewrite

log = logging.getLogger(__name__)


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """What `torch.compile(model, backend="bla")` would rewrite in `model(*args, **kwargs)`.

    `model` is a module or a function, compiled already or not. It is called once, eagerly: under
    the grad mode, autocast and training flag in force, with the options of the environment
    (BLA_*). Buffers and the random number generators are put back afterwards, and what was
    compiled before stays compiled. In-place changes of the arguments, and of plain Python
    attributes, stay.

    Returns the reports of all graphs in one, in the order in which Dynamo made them.
    """
    options, _ = Options.parse()
    reports: list[Report] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        as_written = copy_graphs(gm)  # the rewrite is in place, nested graphs included
        reports.append(rewrite(gm, example_inputs, options))
        return as_written.forward

    call = fresh_call(original(model))
    with state_kept(model):
        torch.compile(call, backend=collect, **isolated())(*args, **kwargs)
    if not reports:
        log.warning(
            "Dynamo made no graph of this call, so there is nothing to explain. "
            "Is it disabled (TORCHDYNAMO_DISABLE, torch.compiler.disable)?"
        )
    report, place = sum(reports, Report()), definition(original(model))
    return report if place is None else report.placed(place)


def definition(model: Callable[..., Any]) -> Location | None:
    """Where `model`, or its forward, begins."""
    code = getattr(getattr(model, "forward", model), "__code__", None)
    if code is None:
        return None
    return Location(code.co_filename, code.co_firstlineno, code.co_name)


def original(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `model` runs when it is not compiled.

    Dynamo looks through a compiled function that it meets while it traces, but after a graph break
    it calls it, and then the graphs go to the user's backend.
    """
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):  # of torch.compile(model)
        inner = getattr(model, attribute, None)
        if inner is not None:
            return inner
    if getattr(model, "_compiled_call_impl", None) is not None:  # after model.compile()
        return model._call_impl  # type: ignore[attr-defined]
    return model


def fresh_call(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `model`, with a code object of its own.

    Dynamo keeps what it compiled with the code object of the outermost function. A new one has
    nothing yet, takes nothing from the user's own compilations, and takes its entries with it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


def copy_graphs(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with graphs of its own, nested ones too; parameters and names of inputs are shared."""
    graph = copy.deepcopy(gm.graph)
    inputs, copies = (g.find_nodes(op="placeholder") for g in (gm.graph, graph))
    for node, twin_of_node in zip(inputs, copies, strict=True):
        twin_of_node.name = node.name  # fx renames those that are named as a builtin: `input`
    twin = fx.GraphModule(gm, graph)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copy_graphs(child))
    return twin


@contextmanager
def state_kept(model: Callable[..., Any]) -> Iterator[None]:
    """Put back the random number generators, and each buffer that the call changes.

    Values are compared and not `_version`, which batch_norm does not count up on its running
    statistics. A buffer that did not change is not touched: autograd may have saved it.
    """
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
