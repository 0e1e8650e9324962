"""Graphs put back as they were, after a change of ours that failed half-way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from bla_inductor.failures import warn_once

__all__ = ["Snapshot", "undone_on_failure", "warned_on_failure"]


class Snapshot:
    """What every node of `graph` reads and knows, and the order of the nodes.

    Taking one copies no tensor and costs about a microsecond a node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes = [(n, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]

    def restore(self) -> None:
        """Names, order, arguments and metadata as they were.

        A node that was erased comes back as a new object: torch has no way to revive one.
        """
        graph = self._graph
        alive = set(graph.nodes)
        revived: dict[fx.Node, fx.Node] = {}
        following: fx.Node | None = None
        for node, *_ in reversed(self._nodes):
            if node not in alive:
                with graph.inserting_before(following):
                    revived[node] = graph.create_node(
                        node.op, node.target, type_expr=node.type, name=node.name
                    )
                revived[node].name = node.name  # the graph never gives a name twice
            elif following is not None:
                following.prepend(node)
            following = revived.get(node, node)
        own = set()
        for node, args, kwargs, meta in self._nodes:
            node = revived.get(node, node)
            own.add(node)
            node.args, node.kwargs = fx.map_arg((args, kwargs), lambda n: revived.get(n, n))
            node.meta.clear()
            node.meta.update(meta)
        for node in reversed(graph.nodes):
            if node not in own:
                graph.erase_node(node)


@contextmanager
def undone_on_failure(modules: Iterable[Any]) -> Iterator[None]:
    """The graphs of the GraphModules among `modules` are put back if an exception passes."""
    graphs = [m for m in modules if isinstance(m, fx.GraphModule)]
    before = [Snapshot(gm.graph) for gm in graphs]
    try:
        yield
    except Exception:
        for snapshot, gm in zip(before, graphs, strict=True):
            snapshot.restore()
            gm.recompile()
        raise


@contextmanager
def warned_on_failure(graph: fx.Graph, log: logging.Logger, consequence: str) -> Iterator[None]:
    """For a pass that saves something, and costs nobody a compilation: where it fails, `graph` is
    put back, a warning tells so and what follows from it, and what comes after the block goes on.
    """
    before = Snapshot(graph)
    try:
        yield
    except Exception as error:
        before.restore()
        warn_once(log, consequence, error)
