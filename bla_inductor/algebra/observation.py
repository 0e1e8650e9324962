"""What was seen of a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bla_inductor.algebra.index import Size
from bla_inductor.algebra.term import Value

__all__ = ["Body", "Observation", "Opaque", "reads_elements"]

_UNKNOWN = 4096  # what an unbacked size is taken to be where a decision needs a number


_METADATA = {"size", "dim", "ndimension", "numel", "stride", "storage_offset", "is_contiguous"}
_NEW = {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros")}
_LIKE = {f"{kind}_like" for kind in ("empty", "full", "ones", "rand", "randn", "zeros")}
_SHAPED = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_stride.int,
    *(getattr(torch, name) for name in _LIKE),
    *(getattr(torch.ops.aten, name).default for name in _LIKE | _NEW),
}


def reads_elements(node: fx.Node) -> bool:
    """Whether `node` needs more of its inputs than their sizes and the like, which the compiler
    knows without computing them.
    """
    if node.op == "call_method":
        return node.target not in _METADATA | _NEW
    return node.target not in _SHAPED


class Opaque(Exception):
    """The graph cannot be observed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Body:
    """The graph inside a higher-order operator; fixed[i]: argument i is a parameter or the like.

    autocast: the arguments of `torch.autocast` that it runs under, where they are its own.
    """

    module: fx.GraphModule
    fixed: tuple[bool, ...]
    autocast: tuple[Any, ...] | None = None


@dataclass(slots=True)
class Observation:
    """What was seen: a Value and a fake tensor for every node with a tensor result.

    rules: for each rule of the algebra, `NAME` how often it told a result and `NAME tried` how
    often it was asked.
    """

    values: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    position: dict[fx.Node, int] = field(default_factory=dict)
    bodies: list[Body] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    writes: dict[int, list[int]] = field(default_factory=dict)
    draws: set[int] = field(default_factory=set)  # positions of nodes that draw random numbers
    reshaped: set[int] = field(default_factory=set)  # ids of tensors, reshaped in place
    storage: dict[int, int] = field(default_factory=dict)
    mode: FakeTensorMode | None = None
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    def hint(self, size: Size) -> int:
        """A likely number for a size; a large one where nothing is known."""
        if isinstance(size, int):
            return size
        value = size.xreplace({s: sympy.Integer(h) for s, h in self.hints.items()})
        return int(value) if value.is_number else _UNKNOWN

    def storage_of(self, tensor: torch.Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        return self.storage.get(key, key)

    def written_at(self, node: fx.Node) -> list[int]:
        """The storages that `node` writes to."""
        at = self.position.get(node)
        return [storage for storage, writes in self.writes.items() if at in writes]

    def written(self, node: fx.Node, after: int, before: int | None = None) -> bool:
        """Whether the memory of `node` is written after position `after` (and before `before`)."""
        writes = self.writes.get(self.storage_of(self.tensors[node]), ())
        return any(after < w and (before is None or w < before) for w in writes)
