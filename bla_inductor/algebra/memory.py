"""What each tensor of a graph is, told in Values, and which tensors share memory."""

from __future__ import annotations

import torch
from torch import fx

from bla_inductor.algebra.index import as_size
from bla_inductor.algebra.observation import Observation
from bla_inductor.algebra.registry import Unruled
from bla_inductor.algebra.term import Leaf, Origin, Read, Term, Value, leaf_value

__all__ = ["Memory"]


class Memory:
    """The Values of tensors, by their identity, while a graph is walked through.

    now: the position of the node that runs. cuts: products of products as leaves, from which a
    longer chain starts. overwritten: what the node wrote to.
    """

    def __init__(self, seen: Observation) -> None:
        self.seen = seen
        self.values: dict[int, Value] = {}
        self.kept: list[torch.Tensor] = []
        self.by_storage: dict[int, list[torch.Tensor]] = {}
        self.leaf_storage: dict[Leaf, int] = {}
        self.node_of: dict[int, fx.Node] = {}
        self.cuts: dict[int, Value] = {}
        self.overwritten: list[torch.Tensor] = []
        self.now = -1

    def value(self, tensor: torch.Tensor) -> Value:
        known = self.values.get(id(tensor))
        return known if known is not None else self.new_leaf(tensor, fixed=False)

    def __call__(self, tensor: torch.Tensor) -> Value:
        return self.value(tensor)

    def cut(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self.cuts:
            raise Unruled
        return self.cuts[id(tensor)]

    def new_leaf(
        self,
        tensor: torch.Tensor,
        *,
        fixed: bool,
        operation: str = "input",
        node: fx.Node | None = None,
        origin: Origin | None = None,
    ) -> Value:
        shape = tuple(as_size(s) for s in tensor.shape)
        leaf = Leaf(shape, tensor.dtype, fixed, operation, node, self.now, origin=origin)
        return self.keep(tensor, leaf_value(leaf))

    def keep(self, tensor: torch.Tensor, value: Value) -> Value:
        storage = self.seen.storage_of(tensor)
        if id(tensor) not in self.values:
            self.kept.append(tensor)
            self.by_storage.setdefault(storage, []).append(tensor)
        self.values[id(tensor)] = value
        for leaf in value.term.leaves():
            self.leaf_storage.setdefault(leaf, storage)
        return value

    def cut_here(self, tensor: torch.Tensor, operation: str, node: fx.Node | None = None) -> None:
        """From here on `tensor`, which is `node` or no node yet, is a leaf."""
        value = self.value(tensor)
        origin = Origin(operation, (value,))
        self.new_leaf(
            tensor, fixed=value.term.fixed(), operation=operation, node=node, origin=origin
        )

    def handed_on(self, tensor: torch.Tensor, operation: str) -> None:
        """A node returns what was there before, with something done to its gradient: from here on
        it is a leaf of that node.
        """
        self.cut_here(tensor, operation)
        self.node_of.pop(id(tensor), None)
        self.cuts.pop(id(tensor), None)

    def name(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """`node` made `tensor`: leaves that live in it can be read as the node's result."""
        self._name_leaves(node, tensor)
        self.node_of.setdefault(id(tensor), node)
        value = self.seen.values[node] = self.values[id(tensor)]
        self.seen.tensors[node] = tensor
        if value.term.depth > 1:
            shape = tuple(as_size(s) for s in tensor.shape)
            leaf = Leaf(shape, tensor.dtype, value.term.fixed(), "chain", node, self.now)
            self.leaf_storage[leaf] = self.seen.storage_of(tensor)
            self.cuts[id(tensor)] = leaf_value(leaf)

    def name_overwritten(self) -> None:
        """What a statement wrote (`k[~mask] = 0`) can be read as the node that it wrote to."""
        for tensor in self.overwritten:
            node = self.node_of.get(id(tensor))
            if node is not None:
                self._name_leaves(node, tensor)
        self.overwritten.clear()

    def _name_leaves(self, node: fx.Node, tensor: torch.Tensor) -> None:
        value = self.value(tensor)
        unnamed = [leaf for leaf in value.term.leaves() if leaf.node is None]
        if unnamed:
            (leaf, *others) = unnamed
            whole = Read(leaf, value.axes, leaf.dtype)
            if not others and value == Value(Term((whole,)), value.axes, leaf.dtype):
                leaf.node, leaf.born = node, self.now
            else:
                fixed = value.term.fixed()
                origin = Origin(None, (value,))
                self.new_leaf(tensor, fixed=fixed, operation=node.name, node=node, origin=origin)

    def may_be_written(self, tensor: torch.Tensor, operation: str) -> None:
        """Whatever shares the memory of `tensor` is a leaf from here on."""
        storage = self.seen.storage_of(tensor)
        self.overwritten.append(tensor)
        self.cuts = {i: v for i, v in self.cuts.items() if not self.lives_in(v, storage)}
        self.seen.writes.setdefault(storage, []).append(self.now)
        for alias in list(self.by_storage.get(storage, [])):
            node = self.node_of.get(id(alias))
            self.new_leaf(alias, fixed=False, operation=operation, node=node)

    def lives_in(self, value: Value, storage: int) -> bool:
        return any(self.leaf_storage.get(leaf) == storage for leaf in value.term.leaves())
