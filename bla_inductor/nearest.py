"""With nothing matched: what came nearest, and where it stopped.

Two matrix products in a row with something between them that cannot be moved (a softmax, a dropout,
a tanh on the state) are what people take for linear attention when they ask why nothing was found.
So are two with a mask between them that leaves nothing to sum over.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from bla_inductor.algebra import Delta, Guard, Leaf, Observation, Read, Term, Value
from bla_inductor.algebra.tiles import summands
from bla_inductor.patterns import FAMILY
from bla_inductor.report import Refusal, locate

__all__ = ["nearest"]

aten = torch.ops.aten
_MOST_STEPS = 6
_SOFTMAX = {aten._softmax, aten._safe_softmax, aten._log_softmax}
_RANDOM = {"native_dropout", "bernoulli", "rand_like"}
_SUMS = {"add", "add_"}
_NOT_MADE = {"input", "chain"}
_WRITES = {"copy_", "index_put_"}
_RUNNING = {"cumsum", "logcumsumexp", "cumprod"}


def nearest(gm: fx.GraphModule, seen: Observation) -> list[Refusal]:
    """One refusal for each line where a step between two products is all that is in the way."""
    found: dict[tuple[str, str], Refusal] = {}
    told: set[Leaf] = set()
    for node in gm.graph.nodes:
        reason, step = _attention_call(node), _between(seen.values.get(node), seen)
        if step is not None and step not in told:  # else a reshape of the same, lines below
            told.add(step)
            reason = _reason(step)
        if _on_a_diagonal(node, seen):
            reason = (
                "a mask keeps the diagonal of the first product alone, so that the second has "
                "nothing to sum over: write (q * k).sum(-1, keepdim=True) * v, or, of the state, "
                "q * (k * v).sum(-2, keepdim=True)"
            )
        if reason is not None:
            refusal = Refusal(FAMILY, reason, locate(node), node.name)
            found.setdefault((str(refusal.location), reason), refusal)
    return list(found.values())


def _attention_call(node: fx.Node) -> str | None:
    if node.target is torch.nn.functional.scaled_dot_product_attention:
        return (
            "scaled_dot_product_attention is softmax attention: exp(q·k) couples every query with "
            "every key, so there is no state to form first. Its own kernels are left to do it"
        )
    return None


def _between(value: Value | None, seen: Observation) -> Leaf | None:
    """The step between two products, where `value` is the second."""
    if value is None or value.term.depth != 1 or len(value.term.factors) < 2:
        return None
    for read in value.term.factors:
        if isinstance(read, Read) and read.indices() & set(value.term.bound):
            for leaf in _below(read.leaf, seen):
                running = leaf.operation in _RUNNING
                if any(_is_product(v, running) for v in _made_of(leaf, seen)):
                    return leaf
    return None


def _on_a_diagonal(node: fx.Node, seen: Observation) -> bool:
    """Whether `node` is a second product whose sum is over one entry, as a mask in it says."""
    value = seen.values.get(node)
    if value is None or value.term.depth < 2 or len(value.term.bound) > 1:
        return False
    inputs = [seen.values[n].term for n in node.all_input_nodes if n in seen.values]
    return any(term.bound and any(isinstance(f, Delta) for f in term.factors) for term in inputs)


def _made_of(leaf: Leaf, seen: Observation) -> list[Value]:
    """The tensors that `leaf` was made from. An operator with several results has no origin."""
    if leaf.origin is not None:
        return [a for a in leaf.origin.args if isinstance(a, Value)]
    node = leaf.node if leaf.operation not in _NOT_MADE and leaf.parts is None else None
    if node is not None and node.target is operator.getitem:
        node = node.all_input_nodes[0]  # the others are indices
    return [seen.values[n] for n in node.all_input_nodes if n in seen.values] if node else []


def _below(leaf: Leaf, seen: Observation) -> Iterator[Leaf]:
    """`leaf` and what it was made from, one operator after the other."""
    pending, steps = [leaf], 0
    while pending and steps < _MOST_STEPS:
        leaf = pending.pop(0)
        steps += 1
        yield leaf
        values = [v for v in _made_of(leaf, seen) if not _is_product(v)]
        pending += [below for v in values for below in v.term.leaves()]


def _is_product(value: Value, running: bool = False) -> bool:
    """A contraction of two tensors that depend on the input, with a number added or not; or, for a
    running sum, what it sums.
    """
    return _contracts(value.term, 0 if running else 1)


def _sums(value: Value) -> bool:
    """A product, or a sum of some."""
    return all(map(_is_product, summands(value)))


def _contracts(term: Term, depth: int) -> bool:
    if any(isinstance(f, Guard) and _contracts(f.term, depth) for f in term.factors):
        return True
    reads = [f for f in term.factors if isinstance(f, Read) and not f.leaf.fixed]
    if not depth:
        return len(reads) > 1
    return any(sum(i in read.indices() for read in reads) > 1 for i in term.bound)


def _reason(leaf: Leaf) -> str:
    name = leaf.operation
    if leaf.origin is not None and leaf.origin.operator in _SOFTMAX:
        return (
            "a softmax stands between the two products: softmax attention (or, over channels, "
            "cross-covariance attention) has no linear form"
        )
    if name in _RANDOM:
        return (
            "a dropout stands between the two products, and every entry it drops is random; "
            "put it on the output, or call model.eval()"
        )
    if name in _WRITES:
        return (
            "the first product is written into another tensor (x[i] = …) before the next one "
            "reads that; use the product itself, and where there are several, torch.stack them, "
            "or compute them in one"
        )
    parts = leaf.origin.args if leaf.origin is not None and name in _SUMS else ()
    if len(parts) == 2 and all(isinstance(part, Value) and _sums(part) for part in parts):
        return (
            f"`{name}` adds up products (of chunks of the keys, say) before the next one; join "
            "what they are of, torch.cat((k1, k2), -2).mT @ torch.cat((v1, v2), -2), or apply φ "
            "before the keys are cut into chunks, all of which are added up"
        )
    if len(parts) == 2 and any(isinstance(part, Value) and _sums(part) for part in parts):
        return (
            f"`{name}` adds a tensor to the first product before the next one; multiply the two "
            "apart, q @ (k.mT @ v) + q @ tensor, and the product is found"
        )
    return (
        f"`{name}` stands between the two products, so that they cannot be reordered; "
        "apply it to q, k or v, or to the result, if that is what is meant"
    )
