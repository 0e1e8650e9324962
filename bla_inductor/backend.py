"""The backend that `torch.compile(model, backend="bla")` calls, once for every graph of Dynamo's.

Read top down: options, rewrite, report, and what is left goes to Inductor. torch finds `bla` by
the entry point `torch_dynamo_backends`; registering it here as well would be a duplicate name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from bla_inductor.errors import BlaError, BlaNoMatchError
from bla_inductor.logs import announce
from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite

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
    chosen, for_inductor = Options.parse({**({"mode": mode} if mode else {}), **(options or {})})
    compile_inner = inner_compiler(chosen, for_inductor, name)
    report = rewrite_or_leave(gm, example_inputs, chosen)
    if chosen.strict and not report.matches:
        raise BlaNoMatchError(report)
    compiled = compile_inner(gm, example_inputs)
    announce(report)  # not before: the inner compiler may send Dynamo back to the start
    return compiled


def reset() -> None:
    """Drop recorded CUDA graphs. `torch._dynamo.reset()` calls it as `bla.reset()`."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


bla.reset = reset  # type: ignore[attr-defined]
bla.compiler_name = "bla"  # type: ignore[attr-defined]


def rewrite_or_leave(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    fixed: Sequence[bool] | None = None,
) -> Report:
    """Rewrite `gm`; a failure of ours costs the user the speed-up and not the compilation.

    With `strict` the failure is raised. A graph that was left half-way is still the user's: every
    step of the rewrite by itself keeps what the graph computes.
    """
    try:
        return rewrite(gm, example_inputs, options, fixed)
    except Exception as error:
        if options.strict:
            raise
        log.warning(
            "the analysis failed, so this graph is compiled as it was written: %s: %s. "
            "Please report it, with the output of TORCH_LOGS='+bla_inductor'.",
            type(error).__name__,
            error,
        )
        log.debug("the failure of the analysis", exc_info=True)
        return Report()


def inner_compiler(options: Options, for_inductor: dict[str, Any], name: str | None) -> Compiler:
    """What compiles the rewritten graph. Inductor's options are checked here, before any work."""
    from torch._inductor import config

    from bla_inductor.stamp import SLOT, CacheStamp

    users = for_inductor.get(SLOT, getattr(config, SLOT))
    inductor = torch._TorchCompileInductorWrapper(
        options.mode,
        {**for_inductor, SLOT: CacheStamp(options, users)},
        None,
        *((name,) if name else ()),
    )
    if options.inner == "inductor":
        from bla_inductor.lowering import register

        register()
        return inductor

    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(options.inner)
