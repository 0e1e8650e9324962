"""Inductor, and once more without our templates where it fails with them.

A lowering that fails is caught where it happens (`lowering_cuda.py`). What comes later, scheduling,
code generation, Triton and ptxas, often in other processes and for the backward not before it is
first needed, all happens inside the function that compiles one graph, so this is caught around it:
the graph is put back and compiled again with the operators as calls. A failure that this does not
mend is not ours, and is raised as it was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from bla_inductor import compat, failures
from bla_inductor.lowering_cuda import OPERATORS, calls_only
from bla_inductor.undo import undone_on_failure

__all__ = ["falling_back", "inductor"]

log = logging.getLogger(__name__)

# Another process should find out by itself: the next version of Triton may compile it.
_UNCACHED = {"fx_graph_cache": False, "fx_graph_remote_cache": False}


CompileOne = Callable[..., Any]  # (gm, example_inputs, …): Inductor's, for one graph


def inductor(
    settings: Any, around: Callable[[CompileOne], CompileOne] | None = None
) -> Callable[..., Any]:
    """The compiler that `settings`, a `torch._TorchCompileInductorWrapper`, stands for.

    around: what else is put around the function that compiles one graph.
    """

    def wrapped(compile_one: CompileOne) -> CompileOne:
        return falling_back(around(compile_one) if around else compile_one)

    def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if _holds_operators(gm):
            from bla_inductor.lowering import register

            register()
        return compat.compile_with(settings, gm, example_inputs, wrapped)

    return compile_graph


def falling_back(compile_one: CompileOne) -> CompileOne:
    """`compile_one` with a second try."""

    @functools.wraps(compile_one)
    def compile_or_call(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not _holds_operators(gm, "cuda"):
            return compile_one(gm, example_inputs, **kwargs)
        try:
            with undone_on_failure(gm.modules()):
                return compile_one(gm, example_inputs, **kwargs)
        except Exception as error:
            _forget_strides()
            compiled = _with_calls(compile_one, error)(gm, example_inputs, **kwargs)
            failures.warn_once(
                log, "the operators in this graph are called instead of fused", error
            )
            return compiled

    return compile_or_call


def _with_calls(compile_one: CompileOne, first: Exception) -> CompileOne:
    def compile_again(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor import config

        try:
            with calls_only(), config.patch(_UNCACHED):
                return compile_one(*args, **kwargs)
        except Exception as second:
            log.debug("no better with calls", exc_info=second)
            raise first from None

    return compile_again


def _forget_strides() -> None:
    """What Inductor tells AOTAutograd of the results, which it does once."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides:
        context.output_strides.clear()


def _holds_operators(gm: fx.GraphModule, device: str | None = None) -> bool:
    """Whether an operator of ours (on `device`) is called in the graph or one nested in it."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(
        device is None or _device(node) == device
        for graph in graphs
        for operator in OPERATORS
        for node in graph.find_nodes(op="call_function", target=operator)
    )


def _device(node: fx.Node) -> str:
    values = [x.meta.get("val", x.meta.get("example_value")) for x in node.all_input_nodes]
    return next((x.device.type for x in values if isinstance(x, torch.Tensor)), "")
