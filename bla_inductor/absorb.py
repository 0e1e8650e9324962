"""Which tensors the operator reads: before or after their feature map, with or without weights.

The kernels apply φ on the way, so that φ(q) and φ(k) never reach memory; a factor over the keys
alone (a padding mask, a reweighting) is passed beside them. Where φ(q) is needed elsewhere anyway,
or is not one expression of one tensor, φ(q) is the operand and nothing is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from bla_inductor.algebra import Axis, Factor, Observation, Read
from bla_inductor.algebra.observation import reads_elements
from bla_inductor.emit import Unemittable
from bla_inductor.operands import Catalogue, Operand, Source, contracted_dtype
from bla_inductor.ops.feature_torch import finite_at_zero
from bla_inductor.patterns import LinearAttention
from bla_inductor.patterns.feature_maps import FeatureMap, RowWise, X, capture

__all__ = ["Gathered", "common_dtype", "dead_without", "gather", "inside"]


@dataclass(frozen=True, slots=True)
class Gathered:
    """The operands of one attention; `weight` is over the keys and has no columns."""

    q: Operand
    k: Operand
    v: Operand
    q_norm: Operand | None = None
    k_norm: Operand | None = None
    weight: Operand | None = None

    def named(self) -> dict[str, Operand]:
        """Without the weight, by the names of the operator's arguments."""
        named = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }
        return {name: operand for name, operand in named.items() if operand is not None}

    @property
    def reads(self) -> list[tuple[fx.Node, int]]:
        """The nodes to read, and since when each holds the value that is meant."""
        operands = [*self.named().values(), *([self.weight] if self.weight else [])]
        return [pair for operand in operands for pair in operand.nodes]


def gather(
    root: fx.Node,
    found: LinearAttention,
    letters: tuple[Axis, Axis, Axis],
    seen: Observation,
    catalogue: Catalogue,
) -> Gathered:
    """The operands of what takes the place of `root`; letters: batch, n and d in memory order."""
    return _Gatherer(root, found, letters, seen, catalogue).run()


def common_dtype(operands: Iterable[Operand]) -> torch.dtype:
    """The dtype that q, k and v are passed in."""
    dtypes = [o.dtype for o in operands if o.dtype.is_floating_point]
    if not dtypes:
        raise Unemittable("none of q, k, v is a floating-point tensor")
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


class _Gatherer:
    def __init__(
        self,
        root: fx.Node,
        found: LinearAttention,
        letters: tuple[Axis, Axis, Axis],
        seen: Observation,
        catalogue: Catalogue,
    ) -> None:
        self.root, self.found, self.seen, self.catalogue = root, found, seen, catalogue
        self.batch, self.n, self.d = letters

    def run(self) -> Gathered:
        """First everything before its feature map; then without the maps that are not worth it."""
        everything = {"q", "k", "q_norm", "k_norm"}
        weighted = self._build(everything, weights=True)
        if weighted is not None:
            made = self._settled(weighted, weights=True)
            # A product is computed anyway, there the weight costs nothing; its gradient, as a
            # weight, would cost the backward a pass.
            if made.k.map is not None or len(made.k.factors) == 1:
                return made
        return self._settled(self._build(everything, weights=False))

    def _settled(self, made: Gathered | None, *, weights: bool = False) -> Gathered:
        while True:
            assert made is not None
            mapped = {name for name, o in made.named().items() if o.map is not None}
            spoiled = self._spoiled(made, mapped)
            if not spoiled:
                return made
            made = self._build(mapped - spoiled, weights=weights)

    def _build(self, mapped: set[str], *, weights: bool) -> Gathered | None:
        """The operands, those in `mapped` before their feature map if they have one.

        With weights, None where the keys have none that numerator and normaliser share.
        """
        found, z = self.found, self.found.normaliser
        keys, weight = _split(found.k, found.m, found.c) if weights else (found.k, ())
        if weights and not (keys and weight):
            return None

        def operand(name: str, factors: tuple[Factor, ...], rows: Axis, columns: Axis) -> Operand:
            made = self._before_map(factors, rows, columns) if name in mapped else None
            made = made or self._plain(factors, rows, columns)
            return replace(made, rows=made.order(rows), columns=made.order(columns))

        k = operand("k", keys, found.m, found.c)
        q = replace(operand("q", found.q, self.n, k.columns), rows=self.n, columns=k.columns)
        v = replace(operand("v", found.v, k.rows, self.d), rows=k.rows, columns=self.d)
        pieces = tuple(self.catalogue.piece(f, self.root) for f in weight)
        beside = Operand(weight, None, k.rows, (), pieces=pieces) if weight else None
        if z is None:
            return Gathered(q, k, v, weight=beside)
        norm_keys, norm_weight = _split(z.k, z.m, z.c) if weights else (z.k, ())
        k_norm = operand("k_norm", norm_keys, z.m, z.c) if norm_keys else None
        if k_norm is None or (
            beside is not None
            and self._places(beside) != self._places(Operand(norm_weight, None, k_norm.rows, ()))
        ):
            return None
        q_norm = operand("q_norm", z.q, self.n, z.c)
        q_norm = replace(q_norm, rows=self.n, columns=k_norm.columns)
        return Gathered(q, k, v, q_norm, k_norm, beside)

    def _plain(self, factors: tuple[Factor, ...], rows: Axis, columns: Axis) -> Operand:
        kept = self.found.precision
        source = self.catalogue.find(factors, self.root, kept)
        pieces = () if source else tuple(self.catalogue.piece(f, self.root) for f in factors)
        return Operand(factors, source, rows, columns, pieces=pieces, kept=kept)

    def _before_map(self, factors: tuple[Factor, ...], rows: Axis, columns: Axis) -> Operand | None:
        found = capture(factors, columns)
        if found is None or found.identity or found.leaf.node is None:
            return None
        if not _sayable(found):
            return None
        leaf, have = found.leaf, [i for axis in found.axes for i in axis]
        if not leaf.dtype.is_floating_point or len(set(have)) != len(have):
            return None
        if not set(columns) <= set(have) <= {*self.batch, *rows, *columns}:
            return None
        contracted = contracted_dtype(factors, self.found.precision)
        dtype = min(leaf.dtype, contracted, key=_width) if _is_exact(found) else contracted
        assert leaf.node is not None
        return Operand(factors, Source(leaf.node, found.axes, 1.0, dtype), rows, columns, found)

    def _spoiled(self, made: Gathered, mapped: set[str]) -> set[str]:
        """The names whose map stays outside: rounding before φ, or φ(x) that is alive anyway."""
        operands = made.named()
        common = common_dtype(operands.values())
        dead = dead_without(self.root, [node for node, _ in made.reads], self.seen)
        spoiled = set()
        for name in mapped:
            source = operands[name].source
            after = self.catalogue.find(operands[name].factors, self.root)
            assert source is not None
            narrowed = _width(self.seen.tensors[source.node].dtype) > _width(common)
            if narrowed or (after is not None and after.node not in dead):
                spoiled.add(name)
        return spoiled

    def _places(self, operand: Operand) -> object:
        """Where the indices of each factor stand among those of the operand, and of what it is."""
        letters = [*self.batch, *operand.rows]
        return Counter(
            (f.leaf, tuple(letters.index(i) if i in letters else -1 for a in f.axes for i in a))
            for f in operand.reads
        )


def _split(
    factors: Sequence[Factor], rows: Axis, columns: Axis
) -> tuple[tuple[Factor, ...], tuple[Factor, ...]]:
    """(the factors over the features, those over the keys alone): keys and their weights."""
    weights = tuple(
        f
        for f in factors
        if isinstance(f, Read)
        and f.power == 1
        and f.leaf.node is not None
        and f.indices() & set(rows)
        and not f.indices() & set(columns)
    )
    return tuple(f for f in factors if f not in weights), weights


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype.is_floating_point else 8


def _sayable(found: FeatureMap) -> bool:
    """Whether the operator's language has words for it, and its kernels can compute it."""
    try:
        return finite_at_zero(found.text)
    except ValueError:
        return False


def _is_exact(found: FeatureMap) -> bool:
    """Whether φ of a 16-bit number is a 16-bit number: a cast may come before φ or after."""
    return all(_stage_is_exact(stage) for stage in found.stages)


def _stage_is_exact(stage: sympy.Expr | RowWise) -> bool:
    if isinstance(stage, RowWise):
        return False
    pieces = [e for e, _ in stage.args] if isinstance(stage, sympy.Piecewise) else [stage]
    return all(piece in (X, -X, sympy.Abs(X), sympy.S.Zero, sympy.S.One) for piece in pieces)


def dead_without(root: fx.Node, reads: Iterable[fx.Node], seen: Observation) -> set[fx.Node]:
    """The nodes that nobody needs once something that reads `reads` has replaced `root`."""
    dead = {root}
    for node in sorted(inside(root, reads, seen), key=seen.position.__getitem__, reverse=True):
        users = [user for user in node.users if reads_elements(user)]
        if node.op != "placeholder" and all(user in dead for user in users):
            dead.add(node)
    return dead


def inside(root: fx.Node, reads: Iterable[fx.Node], seen: Observation) -> set[fx.Node]:
    """The nodes between `reads` and `root`, and whatever else `root` is made of."""
    stop, found = set(reads), set[fx.Node]()
    first = min((seen.position[node] for node in stop), default=0)
    pending = list(root.all_input_nodes)
    while pending:
        node = pending.pop()
        known = node in found or node in stop or node not in seen.values
        if not known and seen.position[node] > first:
            found.add(node)
            pending += node.all_input_nodes
    return found
