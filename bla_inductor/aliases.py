"""What lies in the memory of a node that is to be replaced: what takes its place has new memory."""

from __future__ import annotations

from torch import fx

from bla_inductor.algebra import Observation

__all__ = ["owns_memory", "shares_memory"]


def owns_memory(node: fx.Node, seen: Observation) -> bool:
    """Whether `node` is the first in its memory, and no view."""
    return _there(node, seen)[0] is node


def shares_memory(node: fx.Node, seen: Observation) -> bool:
    """Whether somebody would miss that `node` lies where what is no view of it does: it was written
    there, and an input lies there or what is read later; or both are results of the graph.
    """
    views = _views(node, seen)
    beside = [n for n in _there(node, seen) if n not in views]
    (output,) = node.graph.find_nodes(op="output")
    returned = any(output in n.users for n in views) and any(output in n.users for n in beside)
    return returned or (
        bool(seen.written_at(node)) and any(_lives_on(n, node, seen) for n in beside)
    )


def _lives_on(other: fx.Node, node: fx.Node, seen: Observation) -> bool:
    """Whether `other` is an input, or another tensor than `node` that is read after it."""
    if other.op in ("placeholder", "get_attr"):
        return True
    at = seen.position[node]
    later = any(seen.position.get(user, at) >= at for user in other.users)
    return later and seen.tensors[other] is not seen.tensors[node]


def _views(node: fx.Node, seen: Observation) -> set[fx.Node]:
    """`node` and its views."""
    found = {node}
    for other in _there(node, seen):
        found |= {other} if found & {*other.all_input_nodes} else set()
    return found


def _there(node: fx.Node, seen: Observation) -> list[fx.Node]:
    """All that lies where `node` does, in the order of the graph."""
    storage = seen.storage_of(seen.tensors[node])
    return [n for n, tensor in seen.tensors.items() if seen.storage_of(tensor) == storage]
