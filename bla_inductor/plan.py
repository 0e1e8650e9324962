"""From a match to nodes: which tensors are the operands, in what layout, in what dtype.

A plan changes nothing; call.py writes the nodes. Either raises `Unemittable` with a reason.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bla_inductor.absorb import Gathered, common_dtype, gather
from bla_inductor.algebra import (
    Axes,
    Axis,
    Index,
    Observation,
    Value,
    axis_size,
    equal,
    product,
)
from bla_inductor.algebra.regions import is_differentiated
from bla_inductor.cost import KERNEL_LIMIT
from bla_inductor.emit import Unemittable, grouped, memory_order
from bla_inductor.operands import Catalogue, Operand, Piece, Source
from bla_inductor.patterns import LinearAttention
from bla_inductor.report import Location

__all__ = ["Plan"]

_INDIFFERENT = {torch.nn.functional.linear, torch._C._nn.linear, torch.matmul, operator.matmul}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be emitted in place of `root`."""

    root: fx.Node
    found: LinearAttention
    gathered: Gathered
    batch: tuple[Index, ...]
    n: Axis
    d: Axis
    out_order: tuple[int, ...] | None
    dtype: torch.dtype
    outer: tuple[Piece, ...]  # what multiplies the result
    exact: bool  # somebody may notice the strides of the result
    location: Location  # the user's line
    axes: Axes  # of `root`
    addend: tuple[fx.Node, Any] | None = None  # a tensor that `root` adds to it, and how often

    @classmethod
    def make(
        cls,
        root: fx.Node,
        found: LinearAttention,
        seen: Observation,
        catalogue: Catalogue,
        location: Location,
        value: Value,
    ) -> Plan:
        """value: what was matched, which is that of `root`, or what `root` adds a tensor to."""
        tensor = seen.tensors[root]
        exact = not all(_ignores_strides(user) for user in root.users)
        dims = memory_order(tensor, seen.hint) if exact else range(tensor.dim())
        flat = [i for dim in dims for i in value.axes[dim]]
        batch, n, d = _letters(found, flat, seen)
        gathered = gather(root, found, (batch, n, d), seen, catalogue)
        position = {i: at for at, i in enumerate(batch)}
        position |= dict.fromkeys(n, len(batch)) | dict.fromkeys(d, len(batch) + 1)
        order = [at for at, _ in itertools.groupby(position[i] for i in flat)]
        dense = len(order) == len(set(order)) == len(batch) + 2
        plan = cls(
            root,
            found,
            gathered,
            batch,
            n,
            d,
            tuple(order) if dense and order != sorted(order) else None,
            tensor.dtype,
            tuple(catalogue.piece(f, root) for f in found.outer),
            exact,
            location,
            value.axes,
            None if value is seen.values[root] else _addend(root, seen),
        )
        plan._check(seen)
        return plan

    @property
    def operands(self) -> dict[str, Operand]:
        return self.gathered.named()

    @property
    def scale(self) -> Any:
        """The number before the sums, without what the outer pieces bring."""
        return self.found.scale / math.prod(piece.coef for piece in self.outer)

    @property
    def reads(self) -> list[tuple[fx.Node, int]]:
        """The nodes that are read, and since when each holds the value that is meant."""
        reads = self.gathered.reads + [(piece.source.node, piece.born) for piece in self.outer]
        return reads if self.addend is None else [*reads, (self.addend[0], -1)]

    @property
    def compute_dtype(self) -> torch.dtype:
        common = common_dtype(self.operands.values())
        wide = self.found.precision == torch.float64  # the operator sums fp64 tensors alone in fp64
        return torch.float64 if wide else common

    @property
    def upcast(self) -> bool:
        """The user contracted 16-bit tensors in fp32: the state may not be rounded to 16 bit."""
        kept = self.found.precision
        return kept is not None and kept.itemsize > self.compute_dtype.itemsize

    def _check(self, seen: Observation) -> None:
        for dtype in (self.compute_dtype, self.dtype):
            if dtype not in _DTYPES:
                raise Unemittable(f"dtype {dtype}: the operator takes fp16, bf16, fp32 and fp64")
        at = seen.position[self.root]
        for node, born in self.reads:
            after = born if born >= 0 else seen.position[node]
            if seen.written(node, after, before=at):
                raise Unemittable(
                    f"`{node}` is modified in place after it was read; "
                    "write it out of place (x = x + y instead of x += y)"
                )
            if is_differentiated(self.root) and seen.written(node, at):
                raise Unemittable(
                    f"`{node}` is modified in place later, and its gradient needs it as it was; "
                    "write it out of place (x = x + y instead of x += y)"
                )
        k, k_norm = self.gathered.k, self.gathered.k_norm
        if k_norm is not None and not equal(axis_size(k_norm.rows), axis_size(k.rows)):
            raise Unemittable("the normaliser sums over another sequence than the numerator")

    def distinct(self) -> dict[str, Operand]:
        """The operands to pass: q' and k' only where they differ from q and k."""
        named = self.operands
        for name, same in zip(("q_norm", "k_norm"), self.shared, strict=True):
            if same:
                named.pop(name, None)
        return named

    @property
    def shared(self) -> tuple[bool, bool]:
        """Whether the normaliser's q' is q, and its k' is k."""
        made = self.gathered
        pairs = ((made.q_norm, made.q), (made.k_norm, made.k))
        same_q, same_k = (
            a is not None and self._signature(a) == self._signature(b) for a, b in pairs
        )
        return same_q, same_k

    def _signature(self, operand: Operand) -> object:
        """What tells one operand from another, whatever indices each is told in."""

        def placed(source: Source) -> object:
            have = [i for axis in source.axes for i in axis]
            places = tuple(
                tuple(have.index(i) if i in have else -1 for i in axis)
                for axis in (self.batch, operand.rows, operand.columns)
            )
            return source.node, places, tuple(i.size for i in have)

        if operand.source is None:
            counted = Counter((p.how, placed(p.source)) for p in operand.pieces)
            return counted, operand.dtype
        text = "" if operand.map is None else operand.map.text
        return placed(operand.source), operand.dtype, text


def _addend(root: fx.Node, seen: Observation) -> tuple[fx.Node, Any]:
    """The tensor that one operator adds to the product inside it, and how often."""
    ((leaf, *_),) = (tuple(seen.values[root].term.leaves()),)
    assert leaf.origin is not None
    added = leaf.origin.args[1]
    node = next((n for n in root.all_input_nodes if seen.values.get(n) == added), None)
    if node is None:
        raise Unemittable("what is added to it in the same operator cannot be separated from it")
    return node, dict(leaf.origin.kwargs)["alpha"]


def _letters(found: LinearAttention, flat: Sequence[Index], seen: Observation) -> tuple[Axis, ...]:
    """The indices of batch, n and d, each in the order in which the result has them in memory.

    An index that v alone carries (heads of the values under one-headed keys) is a value channel as
    well as it is a batch index: it is the latter where the result has it outside n, and where the
    channels would be too many for a kernel.
    """
    groups = grouped(flat, {"batch": found.batch, "n": found.n, "d": found.d})
    batch, n, d = groups["batch"], groups["n"], groups["d"]
    first = min(flat.index(i) for i in n)
    while len(d) > 1 and (
        flat.index(d[0]) < first or seen.hint(product(i.size for i in d)) > KERNEL_LIMIT
    ):
        batch, d = (*batch, d[0]), d[1:]
    return grouped(flat, {"": batch})[""], n, d


def _ignores_strides(user: fx.Node) -> bool:
    """Whether a reader makes the same result, strides included, of any strides of its input."""
    return user.target in _INDIFFERENT
