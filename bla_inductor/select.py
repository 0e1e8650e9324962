"""Which nodes of an observed graph to replace.

Walking back from the output, the richest node is met first: the division before the numerator it
divides, and the transpose and reshape that follow before both, so that the operator writes the
layout that the reader reads. What only a replaced node needed is not visited.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from bla_inductor.absorb import dead_without
from bla_inductor.algebra import Guard, Observation, Read, Value
from bla_inductor.algebra.observation import reads_elements
from bla_inductor.aliases import owns_memory, shares_memory
from bla_inductor.call import emit
from bla_inductor.cost import decide
from bla_inductor.emit import Emitter, Unemittable
from bla_inductor.operands import Catalogue
from bla_inductor.options import Options
from bla_inductor.patterns import FAMILY, LinearAttention, Mismatch, match
from bla_inductor.plan import Plan
from bla_inductor.problem import problem
from bla_inductor.report import Refusal, locate

__all__ = ["Selection", "has_effect", "select"]


@dataclass(slots=True)
class Selection:
    """What was found: plans, in the order of the graph, with the node emitted for each; refusals;
    and the nodes that are needed once the plans' roots are replaced.
    """

    plans: list[tuple[Plan, fx.Node]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    needed: set[fx.Node] = field(default_factory=set)

    @property
    def roots(self) -> set[fx.Node]:
        """The nodes that the plans replace."""
        return {plan.root for plan, _ in self.plans}


def select(gm: fx.GraphModule, seen: Observation, options: Options) -> Selection:
    """Find the places to rewrite, and write the new nodes before them; nothing reads those yet.

    A root that cannot be emitted leaves nothing behind, and the nodes inside it get their turn.
    With options.rewrite == "off" nothing is written, and each plan's node is its root.
    """
    return _Selector(gm, seen, options).run()


def has_effect(
    node: fx.Node,
    seen: Observation,
    needed: set[fx.Node],
    roots: Collection[fx.Node],
    made: Mapping[fx.Node, fx.Node] | None = None,
) -> bool:
    """Whether `node` matters although nothing that matters uses its result.

    A write matters when somebody reads that memory afterwards, or when it is an input's. A replaced
    root and its views, and what was emitted for it, have new memory: what is written to them is not
    what was written inside the root, though both were seen in one place. In doubt a write matters.

    made: the root that each emitted node has replaced, where that has been done.
    """
    storages = seen.written_at(node)
    if not storages:
        return not node.users
    new: dict[fx.Node, bool] = {}

    def storage(node: fx.Node) -> int | None:
        tensor = seen.tensors.get((made or {}).get(node, node))
        return None if tensor is None else seen.storage_of(tensor)

    def is_new(node: fx.Node) -> bool:
        if node in roots or node not in seen.position:
            return True
        if node not in new:
            own = storage(node)
            sources = [n for n in node.all_input_nodes if storage(n) == own]
            new[node] = bool(sources) and all(map(is_new, sources))
        return new[node]

    written: dict[int | None, set[bool]] = {}
    for source in node.all_input_nodes:
        written.setdefault(storage(source), set()).add(is_new(source))
    return any(
        other is not node
        and (other in needed or other.op in ("placeholder", "get_attr"))
        and (where := seen.storage_of(tensor)) in storages
        and is_new(other) in written.get(where, (True, False))
        for other, tensor in seen.tensors.items()
    )


class _Selector:
    def __init__(self, gm: fx.GraphModule, seen: Observation, options: Options) -> None:
        self.gm, self.seen, self.options = gm, seen, options
        self.catalogue = Catalogue(seen)
        self.found: dict[fx.Node, LinearAttention | Mismatch | None] = {}

    def run(self) -> Selection:
        result = Selection()
        needed = result.needed
        refused: dict[tuple[str, frozenset[int]], tuple[Refusal, bool]] = {}
        chosen: set[tuple[frozenset[int], bool]] = set()
        for node in list(reversed(self.gm.graph.nodes)):
            idle = node.op != "output" and node not in needed
            if idle and not has_effect(node, self.seen, needed, result.roots):
                continue
            attention = self.matched(node)
            if isinstance(attention, LinearAttention) and attention.note:
                note = Refusal(FAMILY, attention.note, locate(node), node.name)
                refused[attention.note, frozenset()] = note, False
            if isinstance(attention, LinearAttention) and not self.better_inside(node, attention):
                plan = self.plan(node, attention)
                if not isinstance(plan, Refusal):
                    result.plans.append(plan)
                    chosen.add(_identity(attention))
                    needed.update(node for node, _ in plan[0].reads)
                    continue
                leaves, normalised = _identity(attention)
                refused[plan.reason, leaves] = plan, normalised
            elif isinstance(attention, Mismatch) and not self.told_inside(node, attention):
                refusal = Refusal(FAMILY, attention.reason, locate(node), node.name)
                refused[attention.reason, frozenset()] = refusal, False
            if reads_elements(node):
                needed.update(node.all_input_nodes)
        # A root that did not work is no news where a smaller one of the same attention did.
        told = [r for (_, of), (r, divided) in refused.items() if (of, divided) not in chosen]
        result.refusals = told[::-1]
        result.plans.reverse()
        return result

    def matched(self, node: fx.Node) -> LinearAttention | Mismatch | None:
        if node not in self.found:
            value = self.value(node)
            self.found[node] = None
            made = node.op not in ("placeholder", "output")
            if value is not None and made and _is_product(value):
                self.found[node] = match(
                    value,
                    lambda factors: self.catalogue.find(factors, node) is not None,
                    self.seen.hint,
                )
        return self.found[node]

    def value(self, node: fx.Node) -> Value | None:
        """What is matched at `node`: its Value, or the product in a sum that one operator makes."""
        value = self.seen.values.get(node)
        factors = value.term.factors if value is not None else ()
        if len(factors) != 1 or not isinstance(read := factors[0], Read) or value is None:
            return value
        origin = read.leaf.origin if read.leaf.node is node else None
        if origin is None or origin.operator is not torch.ops.aten.add:
            return value
        first = origin.args[0]
        if not isinstance(first, Value) or "alpha" not in dict(origin.kwargs):
            return value
        apart = any(self.seen.values.get(n) is first for n in node.all_input_nodes)
        return value if apart or not _is_product(first) else first

    def better_inside(self, node: fx.Node, attention: LinearAttention) -> bool:
        """Whether an input of `node` is as rich a match and a better root.

        Better, because what `node` adds is not the operator's business (a gate, a cast to a wider
        dtype, a copy into other memory), or because other code reads the input as well.
        """
        for source in node.all_input_nodes:
            other = self.matched(source)
            if not isinstance(other, LinearAttention) or not _as_rich(other, attention):
                continue
            mine, its = self.seen.values[node], self.seen.values[source]
            widened = mine.dtype.itemsize > its.dtype.itemsize and mine.term is its.term
            written = bool(self.seen.written_at(node))
            if attention.outer or widened or written or self.read_beside(source, node, other):
                return True
        return False

    def told_inside(self, node: fx.Node, mismatch: Mismatch) -> bool:
        """Whether what `node` does to an input's match is no news."""
        inputs = map(self.matched, node.all_input_nodes)
        return mismatch.inner and any(isinstance(m, LinearAttention) for m in inputs)

    def read_beside(self, node: fx.Node, reader: fx.Node, attention: LinearAttention) -> bool:
        """Whether other code reads `node`, or what `reader` reads the same attention of through
        it: there is one result, then, and views of it.
        """
        if any(user is not reader and reads_elements(user) for user in node.users):
            return True
        return any(
            isinstance(other := self.matched(source), LinearAttention)
            and _as_rich(other, attention)
            and self.read_beside(source, node, other)
            for source in node.all_input_nodes
        )

    def statement(self, node: fx.Node, attention: LinearAttention) -> fx.Node:
        """The node that completes the arithmetic; `node` may be a reshape lines below it."""
        for source in node.all_input_nodes:
            other = self.matched(source)
            if isinstance(other, LinearAttention) and _as_rich(other, attention):
                return self.statement(source, other)
        return node

    def plan(self, node: fx.Node, attention: LinearAttention) -> tuple[Plan, fx.Node] | Refusal:
        location = locate(self.statement(node, attention))
        emitter = Emitter(self.gm, self.seen, node)
        try:
            value = self.value(node)
            assert value is not None
            if id(self.seen.tensors[node]) in self.seen.reshaped:
                raise Unemittable("its result is reshaped in place later; use a view of it")
            plan = Plan.make(node, attention, self.seen, self.catalogue, location, value)
            refusal = self.objection(plan)
            if refusal is not None or self.options.rewrite == "off":
                return refusal or (plan, node)
            return plan, emit(plan, emitter, self.seen)
        except Unemittable as reason:
            emitter.undo()
            return Refusal(FAMILY, str(reason), location, node.name)
        except Exception:
            emitter.undo()  # the graph stays the user's; the backend says that we failed
            raise

    def objection(self, plan: Plan) -> Refusal | None:
        """Why a plan that could be carried out is not."""
        node, location = plan.root, plan.location
        decision = decide(problem(plan, self.seen))
        if not decision.pays and self.options.rewrite != "always":
            return Refusal(FAMILY, decision.reason, location, node.name)
        reads = [n for n, _ in plan.reads]
        gone = dead_without(node, reads, self.seen)
        if any(self.seen.position[n] in self.seen.draws for n in gone):
            why = (
                "random numbers that it does not need are drawn inside, and would not be any more; "
                "draw them before, or not at all"
            )
            return Refusal(FAMILY, why, location, node.name)
        if shares_memory(node, self.seen):
            why = "it is written into memory that other tensors hold; write it out of place"
            return Refusal(FAMILY, why, location, node.name)
        if self.seen.written(node, self.seen.position[node]) and not owns_memory(node, self.seen):
            why = "it is a view of a tensor that is modified in place later; write it out of place"
            return Refusal(FAMILY, why, location, node.name)
        return None


def _is_product(value: Value) -> bool:
    """Whether there is a sense in matching it."""
    term = value.term
    divided = any(isinstance(f, Read) and f.power == -1 for f in term.factors)
    return len(term.bound) > 1 or divided or any(isinstance(f, Guard) for f in term.factors)


def _as_rich(a: LinearAttention, b: LinearAttention) -> bool:
    return _identity(a) == _identity(b)


def _identity(attention: LinearAttention) -> tuple[frozenset[int], bool]:
    """What the products are of, and whether they are normalised: two matches with the same are the
    same attention.
    """
    factors = (*attention.q, *attention.k, *attention.v)
    leaves = frozenset(id(leaf) for f in factors for leaf in f.leaves())
    return leaves, attention.normaliser is not None
