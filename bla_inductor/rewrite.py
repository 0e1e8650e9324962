"""Find the families in a Dynamo graph and put the operators in their place.

    observe → walk back from the output, matching every tensor that is still needed → emit → erase
    what is dead

Walking back, the richest node is met first: the division before the numerator it divides, and the
transpose and reshape that follow before both, so that the operator writes the layout that the
reader reads. What only the replaced node needed is not visited. The graph is edited in place;
bodies of checkpoints are visited as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bla_inductor.algebra import Observation, Opaque, observe
from bla_inductor.algebra.observe import undisturbed
from bla_inductor.cost import decide
from bla_inductor.emit import Emitter, Unemittable
from bla_inductor.nearest import nearest
from bla_inductor.operands import Catalogue
from bla_inductor.options import Options
from bla_inductor.patterns import FAMILY, LinearAttention, Mismatch, match
from bla_inductor.plan import Plan
from bla_inductor.report import Match, Refusal, Report, locate
from bla_inductor.wording import dtypes, feature_maps, formula, sizes

__all__ = ["rewrite"]

log = logging.getLogger(__name__)


def rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    """Rewrite `gm` in place and report what was done and what was not, and why.

    example_inputs: one per placeholder (tensors or symbolic integers). With options.rewrite ==
    "off" the graph is only read. What cannot be observed or rewritten stays as the user wrote it,
    with a refusal.
    """
    fixed = [_is_parameter(n) for n in gm.graph.find_nodes(op="placeholder")]
    return _rewrite(gm, example_inputs, fixed, options)


def _rewrite(
    gm: fx.GraphModule, inputs: Sequence[Any], fixed: Sequence[bool], options: Options
) -> Report:
    start = time.perf_counter()
    report = Report(graphs=1, nodes=len(gm.graph.nodes))
    try:
        seen = observe(gm, inputs, fixed)
    except Opaque as opaque:
        node = next(iter(gm.graph.nodes))
        report.refusals.append(Refusal(FAMILY, str(opaque), locate(node)))
        return report
    for error in seen.errors:
        log.debug("a rule of the algebra failed, its result stays a leaf: %s", error)
    with undisturbed(seen.shape_env):
        plans, needed = _select(gm, seen, options, report)
        if not plans and not report.refusals:
            report.refusals += nearest(gm, seen)
        if options.rewrite != "off":
            _apply(gm, seen, plans, needed, report)
    report.seconds = time.perf_counter() - start
    for body in seen.bodies:
        placeholders = body.module.graph.find_nodes(op="placeholder")
        known = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
        report += _rewrite(body.module, known, body.fixed, options)
    report.graphs = 1
    return report


def _select(
    gm: fx.GraphModule, seen: Observation, options: Options, report: Report
) -> tuple[list[Plan], set[fx.Node]]:
    """The places to rewrite, found from the output backwards, and the nodes needed then."""
    catalogue = Catalogue(seen)
    found: dict[fx.Node, LinearAttention | Mismatch | None] = {}

    def matched(node: fx.Node) -> LinearAttention | Mismatch | None:
        if node not in found:
            value = seen.values.get(node)
            found[node] = None
            if value is not None and len(value.term.bound) > 1 and node.op != "placeholder":
                known = lambda factors: catalogue.find(factors, node) is not None  # noqa: E731
                found[node] = match(value, known, seen.hint)
        return found[node]

    plans: list[Plan] = []
    refused: dict[fx.Node, Refusal] = {}
    needed: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and node not in needed and not _has_effect(node, seen, needed):
            continue
        attention = matched(node)
        if isinstance(attention, LinearAttention) and not _inner(node, attention, seen, matched):
            plan = _plan(node, attention, seen, catalogue, options)
            if isinstance(plan, Plan):
                plans.append(plan)
                needed.update(n for o in plan.operands.values() for n, _ in o.nodes)
                needed.update(
                    leaf.node for f in attention.outer for leaf in f.leaves() if leaf.node
                )
                continue
            refused[node] = plan
        elif isinstance(attention, Mismatch):
            refused[node] = Refusal(FAMILY, attention.reason, locate(node), node.name)
        needed.update(node.all_input_nodes)
    report.refusals += _first_of_each(refused)
    return plans[::-1], needed


def _inner(node: fx.Node, attention: LinearAttention, seen: Observation, matched: Any) -> bool:
    """Whether an input of `node` is as rich a match and a better root.

    Better, because what `node` adds is not the operator's business: a gate, or a cast to a wider
    dtype.
    """
    for source in node.all_input_nodes:
        other = matched(source)
        if not isinstance(other, LinearAttention):
            continue
        if (other.normaliser is None) != (attention.normaliser is None):
            continue
        mine, its = seen.values[node], seen.values[source]
        widened = mine.dtype.itemsize > its.dtype.itemsize and mine.term is its.term
        if attention.outer or widened:
            return True
    return False


def _plan(
    node: fx.Node,
    attention: LinearAttention,
    seen: Observation,
    catalogue: Catalogue,
    options: Options,
) -> Plan | Refusal:
    try:
        plan = Plan.make(node, attention, seen, catalogue)
    except Unemittable as reason:
        return Refusal(FAMILY, str(reason), locate(node), node.name)
    decision = decide(plan.problem(seen))
    if not decision.pays and options.rewrite != "always":
        return Refusal(FAMILY, decision.reason, locate(node), node.name)
    storage = seen.storage_of(seen.tensors[node])
    first = next(n for n, t in seen.tensors.items() if seen.storage_of(t) == storage)
    if first is not node and seen.written(node, seen.position[node]):
        why = "it is a view of a tensor that is modified in place later"
        return Refusal(FAMILY, why, locate(node), node.name)
    return plan


def _apply(
    gm: fx.GraphModule, seen: Observation, plans: list[Plan], needed: set[fx.Node], report: Report
) -> None:
    """Emit every plan; one that turns out not to work is taken back and refused."""
    used = {node for node in gm.graph.nodes if node.users}
    replacements: list[tuple[fx.Node, fx.Node]] = []
    for plan in plans:
        emitter = Emitter(gm, seen, plan.root)
        try:
            replacements.append((plan.root, plan.emit(emitter, seen)))
        except Unemittable as reason:
            emitter.undo()
            report.refusals.append(Refusal(FAMILY, str(reason), locate(plan.root), plan.root.name))
            continue
        report.matches.append(
            Match(
                FAMILY,
                formula(plan),
                sizes(plan, seen),
                dtypes(plan),
                locate(plan.root),
                decide(plan.problem(seen)).reason,
                plan.root.name,
                feature_maps(plan),
            )
        )
    # All at the end: the leaf of one attention may be the root of another.
    for root, node in replacements:
        root.replace_all_uses_with(node)
    if replacements:
        _erase_dead(gm, seen, used, needed)
        gm.graph.lint()
        gm.recompile()


def _has_effect(node: fx.Node, seen: Observation, needed: set[fx.Node]) -> bool:
    """Whether `node` matters although nothing that matters uses its result.

    An in-place operator matters when somebody reads that memory afterwards, or when it is an
    input's.
    """
    storages = {s for s, at in seen.writes.items() if seen.position.get(node) in at}
    if not storages:
        return not node.users
    return any(
        (other in needed or other.op in ("placeholder", "get_attr"))
        and seen.storage_of(tensor) in storages
        for other, tensor in seen.tensors.items()
    )


def _erase_dead(
    gm: fx.GraphModule, seen: Observation, used: set[fx.Node], needed: set[fx.Node]
) -> None:
    """Erase what the rewrite has left without a reader, and nothing that was unread before."""
    for node in reversed(gm.graph.nodes):
        if node.users or node.op in ("placeholder", "output") or node not in seen.position:
            continue
        writes = any(seen.position[node] in at for at in seen.writes.values())
        if (node in used or writes) and not (writes and _has_effect(node, seen, needed)):
            gm.graph.erase_node(node)


def _first_of_each(refused: dict[fx.Node, Refusal]) -> list[Refusal]:
    """One refusal for each line and reason, in the order of the graph."""
    seen: dict[tuple[str, str], Refusal] = {}
    for refusal in reversed(refused.values()):
        seen.setdefault((str(refusal.location), refusal.reason), refusal)
    return list(seen.values())


def _is_parameter(placeholder: fx.Node) -> bool:
    """Whether a graph input is a parameter, a buffer or another tensor that a module owns."""
    known = placeholder.meta.get("example_value", placeholder.meta.get("val"))
    if isinstance(known, torch.nn.Parameter):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False
