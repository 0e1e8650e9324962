"""The user's graph beside the rewritten one, forward and backward, both against fp64.

    torch.compile(model, backend="bla", options={"verify": "first"})     or "always"
    print(bla_inductor.verify(model, *args))

`Verified` stands between Dynamo and what the inner compiler made: on the calls that are verified,
`examine` runs the graphs on copies of the inputs, and then one of them, the one that may be
trusted, runs on the inputs themselves. `verdict.py` says what is allowed.

Left alone: graphs in which nothing was rewritten; approximations, which differ on purpose; calls
under a dispatch mode, on fake tensors or while a CUDA graph is recorded: the next call is verified.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bla_inductor.compat import isolated
from bla_inductor.errors import BlaVerificationError
from bla_inductor.examination import Graphs, approximate, examine
from bla_inductor.explainer import fresh_call, original, state_kept
from bla_inductor.options import Options
from bla_inductor.trial import Copies, put_back
from bla_inductor.verdict import Verification, told

__all__ = ["Verified", "verified", "verify"]

log = logging.getLogger(__name__)


def verified(graphs: Graphs, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, verified as the options say; itself where there is nothing to verify."""
    if not graphs.report.matches:
        return compiled
    if approximate(graphs.report):
        log.warning("a graph with approximations is not verified: its results differ on purpose")
        return compiled
    graphs.compiled = compiled
    return Verified(graphs).call


class Verified:
    """What Dynamo calls in place of the compiled graph. State is per graph, and so is `first`."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs: Graphs | None = graphs
        self.calls = graphs.compiled
        self.strict = graphs.options.strict
        self.always = graphs.options.verify == "always"
        self.told: set[str] = set()

    def call(self, *inputs: Any) -> Any:
        graphs = self.graphs
        if graphs is not None and _can_run_twice(inputs):
            try:
                found = examine(graphs, inputs)
            except Exception as error:
                self._failed(error)
            else:
                self._judged(graphs, found)
            if not self.always:
                self.graphs = None  # and with it both graphs
        assert self.calls is not None
        return self.calls(*inputs)

    def _judged(self, graphs: Graphs, found: Verification) -> None:
        log.info("verified: %s", "; ".join([found.summary(), *found.notes]))
        log.debug("%s", found)
        if found.ok:
            return
        if self.strict:
            raise BlaVerificationError(found)
        self.graphs, self.calls = None, graphs.original.forward
        first, *others = found.breaches
        log.warning(
            "the attention rewritten at %s is less accurate than the original: %s%s.%s From now on "
            "this graph runs as you wrote it, uncompiled; options={'rewrite': 'off'} compiles it "
            "without rewriting. Please report it with the script that reproduces it: %s",
            ", ".join(dict.fromkeys(str(match.location) for match in found.report.matches)),
            told(first),
            f", and {len(others)} more of {len(found.comparisons)} results" if others else "",
            "".join(f" {note}." for note in found.notes),
            found.script or "none could be written",
        )

    def _failed(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if self.strict:
            raise BlaVerificationError(Verification(notes=[f"it could not run: {text}"])) from error
        if text not in self.told:
            self.told.add(text)
            log.warning("a rewritten graph could not be verified, and is used as it is: %s", text)
            log.debug("the failure of the verification", exc_info=True)


def verify(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Verification:
    """How accurate `torch.compile(model, backend="bla")` is in `model(*args, **kwargs)`.

    `model` is a module or a function, compiled already or not. Every graph that Dynamo makes of the
    call is compiled with the options of the environment (BLA_*) and, where something was rewritten,
    run beside the original, and both compared with fp64: each output, what is written in place,
    and, where gradients are enabled, the gradient of each input and parameter that requires one,
    for one fixed incoming gradient.

    It runs under the grad mode, autocast and training flag in force. Nothing is left behind: the
    arguments are copied, parameters get no `.grad`, buffers and the random number generators are
    put back, and what was compiled before stays compiled. Plain Python attributes that the model
    changes stay changed. It needs memory for the activations of one graph in fp64, and for the
    results of three runs.

    Returns a `Verification`, whose `ok`, `breaches` and `comparisons` tell, which prints as a
    table, and whose `check()` raises BlaVerificationError on a breach. Raises what the model and
    the inner compiler raise.
    """
    from bla_inductor.backend import inner_compiler, rewrite_or_leave

    options, _ = Options.parse()
    total = Verification()
    called: list[Graphs] = []
    touched: list[tuple[Tensor, Tensor]] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compile_inner = inner_compiler(replace(options, verify="always"), {}, None)
        graphs = Graphs.of(gm, options, {})
        graphs.rewrite_done(gm, rewrite_or_leave(gm, example_inputs, options))
        if graphs.report.matches and not approximate(graphs.report):
            graphs.compiled = compile_inner(gm, example_inputs)

        def call(*inputs: Any) -> Any:
            if not any(graphs is other for other in called):
                called.append(graphs)
                total.report += graphs.report
                if approximate(graphs.report):
                    total.notes.append("approximations differ on purpose and are not compared")
            if graphs.compiled is not None:
                _add(total, examine(graphs, inputs))
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            touched.extend((x, x.detach().clone()) for x in tensors)
            return graphs.original.forward(*inputs)

        return call

    flat, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten(Copies.of(flat, {}).arguments, spec)
    run_once = fresh_call(original(model))
    with state_kept(model):
        try:
            torch.compile(run_once, backend=collect, **isolated())(*args, **kwargs)
        finally:
            put_back(touched[::-1])
    return total


def _add(total: Verification, found: Verification) -> None:
    """Another graph, or another call of the same one: its number tells the names apart."""
    total.calls += 1
    suffix = f" ({total.calls})" if total.calls > 1 else ""
    total.comparisons += [replace(row, name=row.name + suffix) for row in found.comparisons]
    total.notes += [note for note in found.notes if note not in total.notes]
    total.script = total.script or found.script


def _can_run_twice(inputs: Sequence[Any]) -> bool:
    if _get_current_dispatch_mode() is not None:
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return not any(isinstance(x, FakeTensor) for x in inputs)
