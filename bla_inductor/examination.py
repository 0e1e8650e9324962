"""One graph, examined: as written, in fp64 and as rewritten, on the same inputs.

Of random numbers all three see the same: each run starts from the same state, Inductor is told to
draw what eager draws (`fallback_random`), and the run in fp64 is given those of the original.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from bla_inductor.compat import isolated
from bla_inductor.explainer import copy_graphs, fresh_call
from bla_inductor.fp64 import WIDE, Drawn, NoFp64, Wide, twin
from bla_inductor.options import Options
from bla_inductor.report import Location, Report, locate
from bla_inductor.trial import Copies, Results, changed_by, run, varied
from bla_inductor.verdict import (
    Comparison,
    Verification,
    beside_compiled,
    coarsest,
    compare,
    pooled,
)

__all__ = ["Graphs", "approximate", "examine"]

log = logging.getLogger(__name__)

DRAWS = 8  # of inputs, for what may be chance


def approximate(report: Report) -> bool:
    """Whether results were asked to differ."""
    return any(match.approximate for match in report.matches)


@dataclass(slots=True)
class Graphs:
    """One Dynamo graph as written and as rewritten, and what the inner compiler made of that.

    original: the graph as written, to be run; the same with its bodies called directly.

    Made before the rewrite, which is in place; `rewrite_done` is called before the compilation,
    which may change the graph further.
    """

    written: fx.GraphModule
    original: fx.GraphModule
    names: list[str]  # of the inputs
    options: Options
    for_inductor: Mapping[str, Any]
    rewritten: fx.GraphModule | None = None
    compiled: Callable[..., Any] | None = None
    report: Report = field(default_factory=Report)

    @classmethod
    def of(cls, gm: fx.GraphModule, options: Options, for_inductor: Mapping[str, Any]) -> Graphs:
        names = [_name(node) for node in gm.graph.find_nodes(op="placeholder")]
        written = copy_graphs(gm)
        return cls(written, _bodies_called(copy_graphs(gm)), names, options, for_inductor)

    def rewrite_done(self, gm: fx.GraphModule, report: Report) -> None:
        self.report = report
        if report.matches:
            self.rewritten = _bodies_called(copy_graphs(gm))

    def compiled_as_written(self) -> Callable[..., Any]:
        """The graph as written, compiled at its first call as the rewritten one was."""
        from bla_inductor import backend

        def plain(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            options = replace(self.options, verify="first")  # so that it draws what eager draws
            return backend.inner_compiler(options, dict(self.for_inductor), None)(gm, inputs)

        return torch.compile(fresh_call(self.original.forward), backend=plain, **isolated())

    @property
    def place(self) -> Location | None:
        """Of the first match."""
        return self.report.matches[0].location if self.report.matches else None


def examine(graphs: Graphs, inputs: Sequence[Any]) -> Verification:
    """Run the graphs on copies of `inputs`, and compare."""
    assert graphs.rewritten is not None
    assert graphs.compiled is not None
    draws = [_Draw(graphs, inputs)]
    rows = draws[0].beside(graphs.compiled, graphs.original)
    breaches = [row for row in rows if not row.ok]
    if breaches and all(row.doubtful for row in breaches):
        more = [_Draw(graphs, varied(inputs, seed)) for seed in range(1, DRAWS)]
        of_more = [draw.beside(graphs.compiled, graphs.original) for draw in more]
        draws += [draw for draw, own in zip(more, of_more, strict=True) if len(own) == len(rows)]
        rows = pooled([rows, *(own for own in of_more if len(own) == len(rows))])
    found = Verification(rows, graphs.report, draws[0].notes)
    if found.breaches:
        by_itself = draws[0].beside(graphs.rewritten.forward, graphs.rewritten)
        right = all(row.ok for row in by_itself)  # then it is what the inner compiler does
        if right and any(row.doubtful for row in found.breaches):
            alone = graphs.compiled_as_written()
            beside = [draw.beside(alone, graphs.original) for draw in draws]
            found.comparisons = beside_compiled(rows, beside, graphs.options.inner)
    if found.breaches:
        found.notes.append(_culprit(found.breaches[0], by_itself, graphs.options.inner))
        found.script = _script(graphs, inputs, found)
    return found


class _Draw:
    """The original and the exact results for some inputs."""

    def __init__(self, graphs: Graphs, inputs: Sequence[Any]) -> None:
        self.graphs, self.inputs = graphs, inputs
        self.notes: list[str] = []
        original = graphs.original
        self.theirs = run(original.forward, original, Copies.of(inputs, {}))
        self.changed = changed_by(self.theirs, inputs)
        self.eps = coarsest(_values(original, inputs))
        self.exact: Results | None = None
        try:
            self.exact = _in_fp64(original, inputs, self.theirs, self.eps)
        except Exception as error:
            reason = _first_line(error)
            reason = reason if isinstance(error, NoFp64) else f"{type(error).__name__}: {reason}"
            self.notes.append(f"compared with the original alone, not with fp64: {reason}")

    def beside(self, function: Callable[..., Any], owner: fx.GraphModule) -> list[Comparison]:
        """What `function` gives, judged. Raises what says nothing of it: no memory."""
        graphs = self.graphs
        try:
            ours = run(function, owner, Copies.where(self.inputs, self.changed))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            text = f"raises {type(error).__name__}: {_first_line(error)}"
            return [Comparison("the rewritten graph", math.inf, None, 0.0, graphs.place, text)]
        return _compared(graphs, self.changed, ours, self.theirs, self.exact, self.eps)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _in_fp64(
    original: fx.GraphModule, inputs: Sequence[Any], theirs: Results, eps: float
) -> Results:
    if eps <= torch.finfo(torch.float64).eps:
        raise NoFp64("it is in fp64 as it is")
    drawn = Drawn()
    if theirs.drew:
        run(original.forward, original, Copies.of(inputs, {}), drawn)
    wide = twin(original)
    return run(wide.forward, wide, Copies.of(inputs, WIDE), Wide(drawn.replayable()))


def _bodies_called(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph`, changed so that it may be run outside of a compilation.

    What stands for a region or a condition calls the body by itself: their operators would trace it
    anew, out of sight of dispatch modes. A checkpoint draws the same random numbers again, which
    its operator leaves to AOTAutograd.
    """
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    node.target = _CALLED.get(node.target.name(), node.target)
            module.recompile()
    return graph


def _region(body: Any, _identifier: Any, *operands: Any) -> Any:
    return body(*operands)


def _condition(condition: Any, yes: Any, no: Any, operands: Sequence[Any] = ()) -> Any:
    return (yes if condition else no)(*operands)


def _checkpoint(body: Any, *operands: Any, **kwargs: Any) -> Any:
    _, own = tag_activation_checkpoint.divide_kwargs(kwargs)
    return checkpoint(body, *operands, use_reentrant=False, **own)


_CALLED: dict[str, Any] = {
    "invoke_subgraph": _region,
    "cond": _condition,
    "tag_activation_checkpoint": _checkpoint,
}


def _compared(
    graphs: Graphs,
    changed: Sequence[bool],
    ours: Results,
    theirs: Results,
    exact: Results | None,
    eps: float,
) -> list[Comparison]:
    written = graphs.written
    (output,) = written.graph.find_nodes(op="output")
    made_by = pytree.tree_leaves(output.args[0])
    buffers = [name for name, _ in written.named_buffers()]
    weights = [name for name, p in written.named_parameters() if p.requires_grad]

    def side_by_side(
        what: str, names: Sequence[str], places: Sequence[Location | None]
    ) -> list[Comparison]:
        rows = [getattr(results, what) for results in (ours, theirs, exact) if results is not None]
        return compare(
            names[: len(rows[1])], places, rows[0], rows[1], rows[2] if exact else None, eps
        )

    outputs = [f"output {i}" for i in range(len(theirs.outputs))]
    places = [locate(node) if isinstance(node, fx.Node) else None for node in made_by]
    found = side_by_side("outputs", outputs, places)
    # What was not written to compares equal, and says nothing.
    after = [f"{name} afterwards" for name in graphs.names]
    left = side_by_side("after", after, [graphs.place] * len(after))
    found += [row for row, c in zip(left, changed, strict=True) if c]
    kept = [f"{name} afterwards" for name in buffers]
    found += side_by_side("owned", kept, [graphs.place] * len(kept))
    differentiated = [f"gradient of {graphs.names[i]}" for i in theirs.wanted]
    differentiated += [f"gradient of {name}" for name in weights]
    places = [graphs.place] * len(theirs.gradients)
    return found + side_by_side("gradients", differentiated, places)


def _culprit(worst: Comparison, by_itself: Sequence[Comparison], inner: str) -> str:
    """Whether it is the rewriting and its operator, or what they were compiled to."""
    same = next((c for c in by_itself if c.name == worst.name), by_itself[0])
    if same.ok:
        return (
            f"run operator by operator the rewritten graph is right ({same.ours:.1e}), so it is "
            f"the code that {inner} made of it"
        )
    return f"run operator by operator the rewritten graph is as wrong ({same.ours:.1e})"


def _script(graphs: Graphs, inputs: Sequence[Any], found: Verification) -> Any:
    from bla_inductor.reproduction import write_reproduction

    try:
        return write_reproduction(graphs, inputs, found)
    except Exception:
        log.debug("the reproduction script could not be written", exc_info=True)
        return None


def _values(graph: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[Any]:
    """Every tensor in the graph, as it was recorded."""
    yield from inputs
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                yield from pytree.tree_leaves(node.meta.get("example_value"))


def _name(placeholder: fx.Node) -> str:
    """The user's name of a graph input: `self.qkv.weight`, `q`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name  # a method before torch 2.12
    if not name:
        return placeholder.name
    name = re.sub(r"\._(?:modules|parameters|buffers)\[['\"](\w+)['\"]\]", r".\1", name)
    return re.sub(r"^L\[['\"](\w+)['\"]\]", r"\1", name)
