"""The backend that `torch.compile(model, backend="bla")` calls, once for every graph of Dynamo's.

Read top down: options, rewrite, report, and what is left goes to Inductor. torch finds `bla` by
the entry point `torch_dynamo_backends`; registering it here as well would be a duplicate name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from bla_inductor import double_backward, failures, tangents
from bla_inductor.algebra.observe import undisturbed
from bla_inductor.debugger import Recorder
from bla_inductor.errors import BlaError, BlaNoMatchError
from bla_inductor.logs import announce
from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite
from bla_inductor.undo import undone_on_failure
from bla_inductor.watch import Watch

log = logging.getLogger(__name__)

Compiler = Callable[..., Callable[..., Any]]


def bla(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph, its linear attentions replaced by fused operators.

    `gm` is rewritten in place. `mode` and `options` are those of `torch.compile`, which never
    gives both; `bla_inductor.options.Options` lists the keys of our own. `name` is the name of
    the compiled region.

    Raises `BlaOptionError` for an option or value that does not exist, and with `strict`
    `BlaNoMatchError` when nothing was rewritten. Whatever the inner compiler raises passes through.
    """
    if unknown:
        raise BlaError(
            f"torch {torch.__version__} gave the backend arguments it does not know: "
            f"{', '.join(sorted(unknown))}. Upgrade bla-inductor."
        )
    chosen, for_inductor = Options.parse({**(options or {}), "mode": mode} if mode else options)
    if (refusal := tangents.refused(gm)) is not None:
        return as_written(gm, refusal, chosen)
    watch = Watch(gm, example_inputs, chosen, for_inductor)
    compile_inner = inner_compiler(chosen, for_inductor, name, watch.recorder)
    with _who_launches(for_inductor):
        report = rewrite_or_leave(gm, example_inputs, chosen)
    watch.rewritten(gm, report)
    if chosen.strict and not report.matches:
        raise BlaNoMatchError(report)
    if chosen.inner == "eager":
        tangents.asked_for(gm)
    compiled = compile_inner(gm, example_inputs)
    if chosen.inner != "eager":
        compiled = double_backward.refused(compiled, example_inputs, report)
    tell(report, chosen)  # not before: the inner compiler may send Dynamo back to the start
    return watch.verified(compiled)


def _who_launches(for_inductor: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inductor's `cpp_wrapper` as the user wants it, on which the choice of kernels depends."""
    from torch._inductor import config

    wanted = for_inductor.get("cpp_wrapper")
    return nullcontext() if wanted is None else config.patch(cpp_wrapper=wanted)


def reset() -> None:
    """Drop recorded CUDA graphs. `torch._dynamo.reset()` calls it as `bla.reset()`."""
    failures.forget()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


bla.reset = reset  # type: ignore[attr-defined]
bla.compiler_name = "bla"  # type: ignore[attr-defined]


def as_written(gm: fx.GraphModule, report: Report, options: Options) -> Callable[..., Any]:
    """`gm` itself, run by torch."""
    if options.strict:
        raise BlaNoMatchError(report)
    tell(report, options)
    return gm.forward


def rewrite_or_leave(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    fixed: Sequence[bool] | None = None,
) -> Report:
    """Rewrite `gm`; a failure of ours costs the user the speed-up and not the compilation.

    The graph is then as the user wrote it, its nested graphs too, and so are grad mode, autocast
    and the random number generators. With `strict` the failure is raised.
    """
    try:
        with undisturbed(None), undone_on_failure(gm.modules()):
            if options.inner == "inductor":
                from bla_inductor.lowering import register

                register()  # before there is anything in the graph that needs it
            return rewrite(gm, example_inputs, options, fixed)
    except Exception as error:
        if options.strict:
            raise
        failures.warn_once(log, "this graph is compiled as it was written", error)
        return Report()


def tell(report: Report, options: Options) -> None:
    """Publish the report; without `strict`, no failure of that keeps the result from the user."""
    try:
        announce(report)
    except Exception as error:
        if options.strict:
            raise
        failures.warn_once(log, "this graph has no report", error)


def inner_compiler(
    options: Options,
    for_inductor: dict[str, Any],
    name: str | None,
    recorded: Recorder | None = None,
) -> Compiler:
    """What compiles the rewritten graph. Inductor's options are checked here, before any work.

    recorded: what writes down Inductor's output.
    """
    from torch._inductor import config

    from bla_inductor import falling_back
    from bla_inductor.stamp import SLOT, CacheStamp

    users = for_inductor.get(SLOT, getattr(config, SLOT))
    inductor = torch._TorchCompileInductorWrapper(
        options.mode,
        {
            **for_inductor,
            **({"fallback_random": True} if options.verify else {}),  # what eager draws
            SLOT: CacheStamp(options, users),
        },
        None,
        *((name,) if name else ()),
    )
    if recorded is not None:  # what a cache serves has no source
        inductor.config["force_disable_caches"] = True
    if options.inner == "inductor":
        return falling_back.inductor(inductor, recorded.writing if recorded else None)

    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.inner)
