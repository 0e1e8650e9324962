"""`rewrite_exported(program)`: the backend's rewriting for a program of `torch.export`.

    program = torch.export.export(model, args)          # also after program.run_decompositions()
    program = bla_inductor.rewrite_exported(program)
    print(program.graph_module.meta["bla_report"])
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

An exported graph is ATen, with parameters and buffers as placeholders; the program's signature says
which they are. Importing this module registers the operators and their decompositions, which is
what a process needs before `torch.export.load` of a rewritten program, or before compiling one:

    import bla_inductor.exported
    program = torch.export.load("rewritten.pt2")

On a CPU, AOTInductor dissolves the operator, and its package runs without bla. On CUDA the package
calls the operator: import this module before running it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.utils import _pytree as pytree

import bla_inductor.ops  # noqa: F401  (registers torch.ops.bla)
from bla_inductor.backend import rewrite_or_leave
from bla_inductor.compat import replacements
from bla_inductor.errors import BlaNoMatchError, BlaOptionError
from bla_inductor.explainer import copy_graphs
from bla_inductor.logs import announce
from bla_inductor.lowering import register
from bla_inductor.options import Options

__all__ = ["REPORT", "rewrite_exported"]

REPORT = "bla_report"  # the key of the Report in `graph_module.meta` of the result

_OPTIONS = ("strict", "rewrite", "approximate", "approximate_training")
_FOR_COMPILE = {
    "verify": "Instead compare with fp64: bla_inductor.verify(program.module(), *args).",
    "inner": "Nothing is compiled here: choose a backend where the result is compiled.",
    "mode": "Instead give its options to torch._inductor.aoti_compile_and_package.",
}

register()


def rewrite_exported(
    program: ExportedProgram, options: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """`program` with its linear attentions replaced by `torch.ops.bla.linear_attention`.

    `program` may hold the graph that `torch.export.export` made or what `run_decompositions` made
    of it; it is not changed. The result shares its parameters, buffers and constants, and has its
    inputs, outputs, dynamic shapes and module hierarchy; a submodule that disappears inside an
    operator loses the call signature that `preserve_module_call_signature` kept for it. It can be
    run, trained, decomposed, saved, unflattened and compiled as any other.

    options: `strict`, `rewrite`, `approximate` and `approximate_training` of
    `bla_inductor.Options`, with the BLA_* variables as defaults. The others say how to compile:
    Inductor's options are for `aoti_compile_and_package`, and in the place of `verify` there is
    `bla_inductor.verify(program.module(), *args)`.

    What was decided is `result.graph_module.meta["bla_report"]`, a `bla_inductor.Report`, and goes
    to the log and to the counters as in a compilation. It is not saved with the program.

    Raises BlaOptionError for an option that does not exist or is for torch.compile, and with
    `strict` BlaNoMatchError when nothing was rewritten. Without it a failure of the analysis is a
    warning, and nothing changes.
    """
    chosen = _chosen(options)
    graph_module = copy_graphs(program.graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in placeholders]
    owned = [spec.kind is not InputKind.USER_INPUT for spec in program.graph_signature.input_specs]
    mode = detect_fake_mode(values)
    context = tracing(TracingContext(mode))
    by_cpp = config.patch(cpp_wrapper=True)  # what AOTInductor makes launches the kernels
    with context, by_cpp, replacements(graph_module) as replaced, _memory_shared(graph_module):
        report = rewrite_or_leave(graph_module, values, chosen, owned)
    if chosen.strict and not report.matches:
        raise BlaNoMatchError(report)
    for node in _all_nodes(graph_module):
        if "example_value" in node.meta:
            node.meta.setdefault("val", node.meta.pop("example_value"))
    graph_module.meta.update(program.graph_module.meta, **{REPORT: report})
    result = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=_signature(program.graph_signature, graph_module),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=_module_calls(program, graph_module, replaced),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    announce(report)
    return result


def _chosen(given: Mapping[str, Any] | None) -> Options:
    chosen, foreign = Options.parse(given)
    for key, value in foreign.items():
        raise BlaOptionError.unknown_key(key, value, _OPTIONS, ())
    for key, value in (given or {}).items():
        instead = _FOR_COMPILE.get(key.replace("-", "_"))
        if instead is not None and value is not None:
            raise BlaOptionError.for_compile(key, value, _OPTIONS, instead)
    return chosen


@contextmanager
def _memory_shared(graph_module: fx.GraphModule) -> Iterator[None]:
    """Without the recorded tensors where the graph writes to memory: its nodes are run instead.

    `torch.export.load` gives every node a tensor of its own, and who shares memory is forgotten.
    """
    called = [(n, n.target) for n in _all_nodes(graph_module) if isinstance(n.target, OpOverload)]
    records: dict[fx.Node, Any] = {}
    if any(operator._schema.is_mutable for _, operator in called):
        for node, _ in called:
            if any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(node.meta.get("val"))):
                records[node] = node.meta.pop("val")
    try:
        yield
    finally:
        for node, value in records.items():
            node.meta["val"] = value


def _all_nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _signature(old: ExportGraphSignature, graph_module: fx.GraphModule) -> ExportGraphSignature:
    """The signature names the nodes that are the outputs: they may be others now."""
    (output,) = graph_module.graph.find_nodes(op="output")
    specs = [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, fx.Node) else spec
        for spec, node in zip(old.output_specs, output.args[0], strict=True)
    ]
    return ExportGraphSignature(input_specs=list(old.input_specs), output_specs=specs)


def _module_calls(
    program: ExportedProgram, graph_module: fx.GraphModule, replaced: Mapping[str, str]
) -> list[Any]:
    """The inputs and outputs of submodules whose call signature the user had preserved."""
    names = {node.name for node in graph_module.graph.nodes}
    entries = [_copied(entry) for entry in program.module_call_graph]
    for entry in entries:
        if entry.signature is None:
            continue
        arguments = [*entry.signature.inputs, *entry.signature.outputs]
        for argument in arguments:
            while argument.name not in names and argument.name in replaced:
                argument.name = replaced[argument.name]
        if any(argument.name and argument.name not in names for argument in arguments):
            entry.signature = None
    return entries


def _copied(entry: Any) -> Any:
    """A copy to write to, but for its pytree specs: torch warns of those that are copied."""
    signature = entry.signature
    if signature is not None:
        lists = {name: copy.deepcopy(getattr(signature, name)) for name in ("inputs", "outputs")}
        signature = replace(signature, **lists)
    return replace(entry, signature=signature)
