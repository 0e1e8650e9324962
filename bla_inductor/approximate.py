"""Softmax attention replaced by its approximation, where the options ask for one.

    options={"approximate": {"pisa": {"density": 0.15, "block_size": 64}}}

`approximate` finds the sites and writes the new nodes before them; `rewrite` puts them in place
with everything else. What is softmax attention and stays as it is gets a refusal with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

import bla_inductor.ops  # noqa: F401  (registers torch.ops.bla)
from bla_inductor.algebra import Axes, Axis, Factor, Index, Observation, Size, product
from bla_inductor.emit import Emitter, Unemittable, grouped, memory_order
from bla_inductor.operands import Catalogue, Source
from bla_inductor.ops.piecewise import MAX_HEAD_DIM
from bla_inductor.ops.piecewise_aten import chosen_count
from bla_inductor.options import Options, Pisa
from bla_inductor.patterns.linear_attention import Mismatch
from bla_inductor.patterns.piecewise_sparse import SoftmaxAttention, match
from bla_inductor.report import Match, Refusal, locate

__all__ = ["FAMILY", "Approximation", "approximate"]

aten = torch.ops.aten
FAMILY = "piecewise sparse attention"
NOTE = "results are approximate: "
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# With fewer blocks, choosing among them costs more than the ones left out would.
_FEWEST_BLOCKS = 8
_ALWAYS = "options={'rewrite': 'always'} overrides this"


@dataclass(frozen=True, slots=True)
class Approximation:
    """`node` takes the place of `root`; match: what the report says of it."""

    root: fx.Node
    node: fx.Node
    match: Match


def approximate(
    gm: fx.GraphModule, seen: Observation, options: Options
) -> tuple[list[Approximation], list[Refusal]]:
    """Write the approximations that `options` asks for before what they replace.

    Nothing reads the new nodes yet. With options.rewrite == "off" nothing is written, and each
    site is a refusal that says so.
    """
    assert options.approximate is not None
    made: list[Approximation] = []
    refused: dict[tuple[str, str], Refusal] = {}
    done: set[object] = set()
    catalogue = Catalogue(seen)
    for node in list(gm.graph.nodes):
        found = match(
            node, seen, lambda factors, node=node: catalogue.find(factors, node) is not None
        )
        if isinstance(found, SoftmaxAttention):
            if found.softmax in done:  # a reshape, or a gate, of the same attention
                continue
            done.add(found.softmax)
            emitter = Emitter(gm, seen, node)
            try:
                site = _Site(node, found, seen, catalogue, options)
                told = site.match()
                if options.rewrite == "off":
                    raise Unemittable(
                        f"it matches, {told.formula}, but options={{'rewrite': 'off'}} asks for a "
                        "report alone"
                    )
                made.append(Approximation(node, site.emit(emitter), told))
                continue
            except Unemittable as reason:
                emitter.undo()
                found = Mismatch(str(reason))
            except Exception:
                emitter.undo()
                raise
        if isinstance(found, Mismatch):
            location = locate(node)
            refusal = Refusal(FAMILY, found.reason, location, node.name)
            refused.setdefault((str(location), found.reason), refusal)
    return made, list(refused.values())


class _Site:
    """One attention: its operands, its letters in memory order. Raises Unemittable with the reason
    why it stays as it is.
    """

    def __init__(
        self,
        root: fx.Node,
        found: SoftmaxAttention,
        seen: Observation,
        catalogue: Catalogue,
        options: Options,
    ) -> None:
        self.root, self.found, self.seen, self.options = root, found, seen, options
        assert options.approximate is not None
        self.pisa: Pisa = options.approximate
        self.result = seen.tensors[root]
        self.sources = {
            name: _source(name, factors, root, catalogue)
            for name, factors in (("q", found.q), ("k", found.k), ("v", found.v))
        }
        flat = [i for d in memory_order(self.result, seen.hint) for i in found.axes[d]]
        letters = grouped(flat, {"batch": found.batch, "n": found.n, "d": found.d})
        self.flat, self.batch, self.n, self.d = flat, *letters.values()
        keys = [i for axis in self.sources["k"].axes for i in axis]
        self.m, self.c = grouped(keys, {"m": found.m, "c": found.c}).values()
        self._check()

    def _check(self) -> None:
        found, seen, root, pisa = self.found, self.seen, self.root, self.pisa
        known = root.meta.get("example_value", root.meta.get("val"))
        differentiated = isinstance(known, torch.Tensor) and known.requires_grad
        if differentiated and not self.options.approximate_training:
            raise Unemittable(
                "it needs gradients, and the approximation has none of softmax attention; run it "
                "under torch.no_grad() or torch.inference_mode(), or ask for the gradients of the "
                "approximation with options={'approximate_training': True}"
            )
        for dtype in (self.dtype, self.result.dtype):
            if dtype not in _DTYPES:
                raise Unemittable(f"dtype {dtype}: the operator takes fp16, bf16, fp32 and fp64")
        if len({seen.tensors[s.node].device for s in self.sources.values()}) != 1:
            raise Unemittable("q, k and v are on different devices")
        if max(self.size(self.c), self.size(self.d)) > MAX_HEAD_DIM:
            raise Unemittable(
                f"head dims of {self.size(self.c)} and {self.size(self.d)}: the kernels take up to "
                f"{MAX_HEAD_DIM}; use more heads"
            )
        scale = self.scale
        if scale is not None and not sympy.sympify(scale).is_positive:
            raise Unemittable(
                f"its scores are scaled by {scale}, which is not known to be positive"
            )
        for operand, source in self.sources.items():
            born = max(leaf.born for f in getattr(found, operand) for leaf in f.leaves())
            if seen.written(source.node, born, before=seen.position[root]):
                raise Unemittable(
                    f"`{source.node}` is modified in place after it was read; write it out of "
                    "place (x = x + y instead of x += y)"
                )
        if seen.written(root, seen.position[root]) and not self._owns_memory():
            raise Unemittable("its result is modified in place later; write it out of place")
        blocks, count = self.blocks, chosen_count(pisa.density, self.blocks)
        if count >= blocks:
            raise Unemittable(
                f"{self.size(self.m)} keys are {blocks} blocks of {pisa.block_size}, all of which "
                f"density={pisa.density:g} selects: there is nothing to approximate"
            )
        if self.options.rewrite == "always":
            return
        if blocks < _FEWEST_BLOCKS:
            raise Unemittable(
                f"{self.size(self.m)} keys are {blocks} blocks of {pisa.block_size}; below "
                f"{_FEWEST_BLOCKS}, choosing among them costs more than it saves ({_ALWAYS})"
            )
        if self.work > 0.6:
            raise Unemittable(
                f"density={pisa.density:g} leaves {self.work:.0%} of the arithmetic, which the "
                f"selection makes no faster than exact attention; lower it ({_ALWAYS})"
            )

    def _owns_memory(self) -> bool:
        storage = self.seen.storage_of(self.result)
        tensors = self.seen.tensors.items()
        return next(n for n, t in tensors if self.seen.storage_of(t) == storage) is self.root

    @property
    def scale(self) -> Any:
        """What q·k of the operands is multiplied by; None for 1/√D."""
        scale = self.found.scale
        return None if scale is None else scale / (self._coef("q") * self._coef("k"))

    def _coef(self, name: str) -> Any:
        return self.sources[name].coef

    @property
    def blocks(self) -> int:
        return -(-self.size(self.m) // self.pisa.block_size)

    @property
    def work(self) -> float:
        """The arithmetic against exact attention's: selected keys, and the means of two tensors."""
        count = chosen_count(self.pisa.density, self.blocks)
        return count / self.blocks + 2 / self.pisa.block_size

    @property
    def dtype(self) -> torch.dtype:
        """What q, k and v are passed in."""
        dtypes = [s.dtype for s in self.sources.values()]
        common = dtypes[0]
        for dtype in dtypes[1:]:
            common = torch.promote_types(common, dtype)
        return common

    def size(self, axis: Sequence[Index]) -> int:
        return self.seen.hint(product(i.size for i in axis))

    def match(self) -> Match:
        pisa = self.pisa

        def told(axis: Axis) -> Size:
            return product(i.size for i in axis)

        batch = "·".join(str(i.size) for i in self.batch) or "1"
        names = {"N": self.n, "M": self.m, "D": self.c, "Dv": self.d}
        sizes = " ".join(f"{name}={told(axis)}" for name, axis in names.items())
        operands = ", ".join(f"{name} = {s.node.name}" for name, s in self.sources.items())
        count = chosen_count(pisa.density, self.blocks)
        scale = self.found.scale
        told_scale = f"{scale:.6g}" if isinstance(scale, float) else str(scale or "1/√D")
        return Match(
            FAMILY,
            f"out[…,n,d] = Σ_m softmax_m({told_scale} · Σ_c q[…,n,c]·k[…,m,c])·v[…,m,d] with "
            f"{operands}",
            f"B={batch} {sizes}",
            str(self.dtype).removeprefix("torch."),
            locate(self.root),
            f"{count} of {self.blocks} key blocks are exact: {self.work:.0%} of the arithmetic",
            self.root.name,
            approximate=f"{NOTE}the {count} most important of {self.blocks} blocks of "
            f"{pisa.block_size} keys exactly, the others by their means and a first-order term "
            f"(PISA, density={pisa.density:g})",
        )

    def emit(self, emitter: Emitter) -> fx.Node:
        rows: dict[str, tuple[Axis, Axis]] = {
            "q": (self.n, self.c),
            "k": (self.m, self.c),
            "v": (self.m, self.d),
        }
        nodes = {}
        for name, source in self.sources.items():
            node = emitter.cast(emitter.cast(source.node, source.dtype), self.dtype)
            target: Axes = (*((i,) for i in self.batch), *rows[name])
            fill = [False] * len(self.batch) + [True, True]
            nodes[name] = emitter.laid_out(node, source.axes, target, fill)
        gain: Any = self.found.gain / self._coef("v")
        result = emitter.call(
            torch.ops.bla.piecewise_sparse_attention.default,
            *nodes.values(),
            density=self.pisa.density,
            block_size=self.pisa.block_size,
            scale=None if self.scale is None else emitter.number(self.scale),
            approximate_training=self.options.approximate_training,
            out_order=self._order(),
        )
        if gain != 1:
            result = emitter.call(aten.mul.Tensor, result, emitter.number(gain))
        axes: Axes = (*((i,) for i in self.batch), self.n, self.d)
        result = emitter.laid_out(result, axes, self.found.axes, [False] * len(self.found.axes))
        result = emitter.cast(result, self.result.dtype)
        if not emitter.same_layout(result, self.result):
            order = memory_order(self.result, self.seen.hint)
            result = emitter.call(aten.permute.default, result, order)
            result = emitter.call(aten.clone.default, result, memory_format=torch.contiguous_format)
            inverse = [order.index(dim) for dim in range(len(order))]
            result = emitter.call(aten.permute.default, result, inverse)
        if not emitter.same_layout(result, self.result):
            raise Unemittable("its result has strides that no kernel writes")
        return result

    def _order(self) -> list[int] | None:
        """The operator's dims as the result has them in memory, where they do not interleave."""
        position = {i: at for at, i in enumerate(self.batch)}
        position |= dict.fromkeys(self.n, len(self.batch))
        position |= dict.fromkeys(self.d, len(self.batch) + 1)
        order = [at for at, _ in itertools.groupby(position[i] for i in self.flat)]
        dense = len(order) == len(set(order)) == len(self.batch) + 2
        return order if dense and order != sorted(order) else None


def _source(name: str, factors: tuple[Factor, ...], root: fx.Node, catalogue: Catalogue) -> Source:
    source = catalogue.find(factors, root)
    if source is None or any(leaf.node is None for f in factors for leaf in f.leaves()):
        raise Unemittable(f"{name} is computed inside the same operator; compute it before")
    return source
