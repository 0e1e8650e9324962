"""Find the families in a Dynamo graph and put the operators in their place.

    observe → select → emit → erase what is dead

The graph is edited in place; bodies of checkpoints are visited as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from bla_inductor.algebra import Observation, Opaque, observe
from bla_inductor.algebra.observe import undisturbed
from bla_inductor.approximate import Approximation, approximate
from bla_inductor.cost import decide
from bla_inductor.nearest import nearest
from bla_inductor.options import Options
from bla_inductor.patterns import FAMILY
from bla_inductor.plan import Plan
from bla_inductor.problem import problem
from bla_inductor.report import Match, Refusal, Report, locate
from bla_inductor.select import Selection, has_effect, select
from bla_inductor.weights import weights
from bla_inductor.wording import dtypes, feature_maps, formula, sizes

__all__ = ["rewrite"]

log = logging.getLogger(__name__)


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    fixed: Sequence[bool] | None = None,
) -> Report:
    """Rewrite `gm` in place and report what was done and what was not, and why.

    example_inputs: one per placeholder (tensors or symbolic integers); fixed: for each, whether it
    is a parameter or a buffer, where the graph itself does not say so. With options.rewrite ==
    "off" the graph is only read. What cannot be observed or rewritten stays as the user wrote it,
    with a refusal.
    """
    if fixed is None:
        fixed = weights(gm)
    return _rewrite(gm, example_inputs, fixed, options)


def _rewrite(
    gm: fx.GraphModule, inputs: Sequence[Any], fixed: Sequence[bool], options: Options
) -> Report:
    start = time.perf_counter()
    report = Report(graphs=1, nodes=len(gm.graph.nodes))
    try:
        seen = observe(gm, inputs, fixed)
    except Opaque as opaque:
        node = next(n for n in gm.graph.nodes if n.op != "placeholder")
        reason = str(opaque).partition("\n")[0]  # the interpreter adds where it was
        report.refusals.append(Refusal(FAMILY, reason, locate(node)))
        return report
    report.rules = seen.rules
    for error in seen.errors:
        log.debug("a rule of the algebra failed, its result stays a leaf: %s", error)
    _rename_written(gm, seen)
    with undisturbed(seen.mode):
        selection = select(gm, seen, options)
        report.refusals += selection.refusals
        approximations: list[Approximation] = []
        if options.approximate is not None:
            approximations, refused = approximate(gm, seen, options)
            report.refusals += refused
        if not selection.plans and not approximations and not report.refusals:
            report.refusals += nearest(gm, seen)
        if options.rewrite == "off":
            report.refusals += [_only_reported(plan) for plan, _ in selection.plans]
        elif selection.plans or approximations:
            _apply(gm, seen, selection, approximations, report)
    report.seconds = time.perf_counter() - start
    for body in seen.bodies:
        placeholders = body.module.graph.find_nodes(op="placeholder")
        known = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
        with torch.autocast(*body.autocast) if body.autocast else nullcontext():
            report += _rewrite(body.module, known, body.fixed, options)
    report.graphs = 1
    return report


def _apply(
    gm: fx.GraphModule,
    seen: Observation,
    selection: Selection,
    approximations: Sequence[Approximation],
    report: Report,
) -> None:
    """Put the emitted nodes in the place of the roots, and erase what is dead then."""
    used = {node for node in gm.graph.nodes if node.users}
    for plan, _ in selection.plans:
        why = decide(problem(plan, seen)).reason
        told = (formula(plan), sizes(plan, seen), dtypes(plan), plan.location, why)
        report.matches.append(Match(FAMILY, *told, plan.root.name, feature_maps(plan)))
    report.matches += [one.match for one in approximations]
    # All at the end: the leaf of one attention may be the root of another.
    pairs = [(plan.root, node) for plan, node in selection.plans]
    pairs += [(one.root, one.node) for one in approximations]
    for root, node in pairs:
        _keep_gradient(root, node)
        root.replace_all_uses_with(node)
    made = {node: root for root, node in pairs}
    _erase_dead(gm, seen, used, selection, made)
    gm.graph.lint()
    gm.recompile()


def _keep_gradient(root: fx.Node, node: fx.Node) -> None:
    """`node` was made under no_grad. A nested compile region takes it that a result whose recorded
    value requires no gradient has none.
    """
    known = root.meta.get("example_value")
    if isinstance(known, torch.Tensor) and known.requires_grad:
        node.meta["example_value"].requires_grad_()


def _rename_written(gm: fx.GraphModule, seen: Observation) -> None:
    """After `y = x.div_(z)`, x and y are one tensor: let what follows read y, which says more."""
    tensors = seen.tensors
    for node in [n for n in gm.graph.nodes if n in tensors]:
        for source in node.all_input_nodes:
            if tensors.get(source) is tensors[node] and seen.written_at(node):
                later = seen.position[node]
                source.replace_all_uses_with(
                    node, lambda user, at=later: seen.position.get(user, at) > at
                )


def _only_reported(plan: Plan) -> Refusal:
    why = f"it matches, {formula(plan)}, but options={{'rewrite': 'off'}} asks for a report alone"
    return Refusal(FAMILY, why, plan.location, plan.root.name)


def _erase_dead(
    gm: fx.GraphModule,
    seen: Observation,
    used: set[fx.Node],
    selection: Selection,
    made: Mapping[fx.Node, fx.Node],
) -> None:
    """Erase what the rewrite has left without a reader, and nothing that was unread before."""
    needed, roots = selection.needed, selection.roots
    for node in reversed(gm.graph.nodes):
        if node.users or node.op in ("placeholder", "output") or node not in seen.position:
            continue
        if seen.position[node] in seen.draws:
            continue  # what is drawn after it would be other numbers
        writes = bool(seen.written_at(node))
        if writes and has_effect(node, seen, needed, roots, made):
            continue
        if node in used or writes:
            gm.graph.erase_node(node)
