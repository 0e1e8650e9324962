"""The dispatch mode that turns every ATen operator into Values, and knows who shares memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bla_inductor.algebra import joined_rules, layout_rules, product_rules
from bla_inductor.algebra.index import Inexpressible, as_size, axis_size, equal
from bla_inductor.algebra.observation import Observation
from bla_inductor.algebra.registry import LAYOUT, RULES, Lookup, Unruled
from bla_inductor.algebra.term import Leaf, Origin, Read, Term, Value, leaf_value

__all__ = ["Observer"]

_ = (joined_rules, layout_rules, product_rules)  # imported for the rules they register


class Observer(TorchDispatchMode):
    def __init__(self, seen: Observation) -> None:
        super().__init__()
        self.seen = seen
        self.values: dict[int, Value] = {}
        self.kept: list[torch.Tensor] = []
        self.by_storage: dict[int, list[torch.Tensor]] = {}
        self.leaf_storage: dict[Leaf, int] = {}
        self.node_of: dict[int, fx.Node] = {}
        self.cuts: dict[int, Value] = {}
        self.now = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._write(func, args, kwargs, out)
        else:
            self._record(func, args, kwargs, out)
        return out

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

    def _apply(
        self, packet: Any, out: Any, args: Any, kwargs: Any, lookup: Lookup | None = None
    ) -> list[Value | None]:
        """The rule's Values for the tensors of `out`, or None for each that must be a leaf."""
        outs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        rule = RULES.get(packet)
        result: Any = None
        if rule is not None:
            try:
                result = rule(lookup or self, out, *args, **kwargs)
            except (Inexpressible, Unruled):
                pass
            except Exception as e:  # a rule may not cost the user their compile: a leaf instead
                self.seen.errors.append(f"{packet}: {type(e).__name__}: {e}")
        values = result if isinstance(result, Sequence) else [result] * len(outs)
        return [self._checked(packet, v, t) for v, t in zip(values, outs, strict=True)]

    def _checked(self, packet: Any, value: Value | None, tensor: torch.Tensor) -> Value | None:
        """A Value whose axes disagree with the shape comes of a wrong rule: it is not believed."""
        if value is None:
            return None
        right = len(value.axes) == tensor.dim() and all(
            equal(axis_size(a), as_size(s)) for a, s in zip(value.axes, tensor.shape, strict=True)
        )
        if not right:
            self.seen.errors.append(f"{packet}: axes {value.axes} for shape {tuple(tensor.shape)}")
        return value if right else None

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not outs:
            return
        values = self._apply(func.overloadpacket, out, args, kwargs)
        fixed = None
        for tensor, value in zip(outs, values, strict=True):
            if value is None:
                fixed = self._fixed(args, kwargs) if fixed is None else fixed
                name = func.overloadpacket.__name__
                origin = self._origin(func, args, kwargs) if len(outs) == 1 else None
                self.new_leaf(tensor, fixed=fixed, operation=name, origin=origin)
            else:
                self.keep(tensor, value)
        if func.overloadpacket in LAYOUT and id(args[0]) in self.cuts:
            values = self._apply(func.overloadpacket, out, args, kwargs, _Cut(self))
            if values[0] is not None:
                self.cuts[id(out)] = values[0]

    def _origin(self, func: Any, args: Any, kwargs: Any) -> Origin:
        """How a leaf was made, told in Values: feature maps and signs are read off it."""

        def told(x: Any) -> Any:
            return self.value(x) if isinstance(x, torch.Tensor) else x

        return Origin(func.overloadpacket, tuple(map(told, args)), tuple(kwargs.items()))

    def _fixed(self, args: Any, kwargs: Any) -> bool:
        terms = [
            self.value(t).term
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        ]
        return all(term.fixed() or not term.factors for term in terms)

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An in-place operator: the tensor written gets a new Value, its aliases become leaves."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        targets = [
            t
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
            for t in pytree.tree_leaves(named.get(a.name))
            if isinstance(t, torch.Tensor)
        ]
        packet = func.overloadpacket
        pure = getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)
        for target in targets:
            value = None
            if len(targets) == 1 and out is target and pure is not None:
                others = {k: v for k, v in kwargs.items() if v is not target}
                (value,) = self._apply(pure, target, args, others)
            fixed = self._fixed(args, kwargs)
            storage = self.seen.storage_of(target)
            self.cuts = {i: v for i, v in self.cuts.items() if not self._lives_in(v, storage)}
            self.seen.writes.setdefault(storage, []).append(self.now)
            if value is not None and self._lives_in(value, storage):
                value = None
            for alias in list(self.by_storage.get(storage, [])):
                if alias is not target:
                    node = self.node_of.get(id(alias))
                    self.new_leaf(alias, fixed=fixed, operation="written", node=node)
            if value is not None:
                self.keep(target, value)
            else:
                self.new_leaf(target, fixed=fixed, operation=packet.__name__)

    def _lives_in(self, value: Value, storage: int) -> bool:
        return any(self.leaf_storage.get(leaf) == storage for leaf in value.term.leaves())

    def name(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """`node` made `tensor`: leaves that live in it can be read as the node's result."""
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
        self.node_of.setdefault(id(tensor), node)
        value = self.seen.values[node] = self.values[id(tensor)]
        self.seen.tensors[node] = tensor
        if value.term.depth > 1:
            shape = tuple(as_size(s) for s in tensor.shape)
            leaf = Leaf(shape, tensor.dtype, value.term.fixed(), "chain", node, self.now)
            self.leaf_storage[leaf] = self.seen.storage_of(tensor)
            self.cuts[id(tensor)] = leaf_value(leaf)


class _Cut:
    """The tensors of an observer told in the leaves that a longer chain starts from."""

    def __init__(self, observer: Observer) -> None:
        self.cut = observer.cut

    def __call__(self, tensor: torch.Tensor) -> Value:
        return self.cut(tensor)
