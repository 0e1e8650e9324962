"""φ and φ' as Triton functions, generated from the text of a feature map.

`compiled(text)` gives two `triton.jit` functions to be called in a kernel, or passed to one as a
`tl.constexpr` argument, for tiles of ROWS tokens × COLS features:

    forward(x, mask)       φ(x)                                  [ROWS, COLS] fp32
    backward(x, g, mask)   the gradient of x; g is that of φ(x)  [ROWS, COLS] fp32

x, g: fp32. mask: bool, of a shape that broadcasts to the tile; where it is false, row-wise stages,
which reduce over axis 1, do not count the place, and the result of a map that has such stages is 0.
Of a map without, it is what φ makes of x there, 0 in the kernels: a number that is multiplied by 0
or not stored. A select behind φ would separate it from its rounding, and double the price of that.

The functions are named after a hash of the text, so that Triton finds its compiled kernels again in
the next process. Their source is in `linecache` alone: Triton needs to read it, nobody to find it.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from bla_inductor.kernels import elementary

from bla_inductor.ops.feature_code import Writer
from bla_inductor.ops.feature_map import RowWise, canonical, parse

__all__ = ["CompiledMap", "compiled"]


@dataclass(frozen=True, slots=True)
class CompiledMap:
    """φ as `text`, and the functions of a kernel that compute φ and its gradient."""

    text: str
    forward: Any
    backward: Any


def compiled(text: str, *, fast: bool = False) -> CompiledMap:
    """The functions for a feature map; the same objects for every text that is read alike.

    fast: exp with an error of 4e-8·|x|, for a result that is rounded to 16 bits.

    ValueError where `text` is not a feature map.
    """
    return _compiled(canonical(text), fast)


@functools.cache
def _compiled(text: str, fast: bool) -> CompiledMap:
    stages = parse(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = f"phi_fast_{digest}" if fast else f"phi_{digest}"
    functions = []
    writer, gradient = _TritonWriter(), _TritonWriter()
    heads = {"": f"{name}(x, mask)", "_backward": f"{name}_backward(x, g, mask)"}
    results = writer.forward(stages, "x"), gradient.gradient(stages, "x", "g")
    has_rows = any(isinstance(stage, RowWise) for stage in stages)
    for suffix, lines, result in zip(heads, (writer, gradient), results, strict=True):
        source = _source(heads[suffix], lines, result, has_rows)
        file = f"<bla {name}{suffix}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope = {"__name__": __name__, "triton": triton, "tl": tl, **_HELPERS}
        if fast:
            scope["exp"] = elementary.fast_exp
        exec(compile(source, file, "exec"), scope)
        functions.append(scope[f"{name}{suffix}"])
    return CompiledMap(text, *functions)


def _source(head: str, writer: Writer, result: str, masked: bool) -> str:
    if not result.isidentifier():
        result = writer.let(f"tl.full(x.shape, {result}, tl.float32)")
    lines = ["@triton.jit", f"def {head}:"]
    result = f"tl.where(mask, {result}, 0.0)" if masked else result
    lines += [f"    {line}" for line in (*writer.lines, f"return {result}")]
    return "\n".join(lines) + "\n"


_NAMES = ("exp", "expm1", "log1p", "sigmoid", "tanh", "sign")
_HELPERS = {name: getattr(elementary, name) for name in _NAMES}


class _TritonWriter(Writer):
    functions = {  # noqa: RUF012
        **{name: f"tl.{name}" for name in ("log", "sqrt", "abs", "erf", "sin", "cos")},
        **{name: name for name in _HELPERS},
    }

    def where(self, condition: str, a: str, b: str) -> str:
        return f"tl.where({condition}, {a}, {b})"

    def power(self, u: str, exponent: str) -> str:
        return f"tl.exp2({exponent} * {self.let(f'tl.log2({u})')})"

    def exponential(self, base: str, u: str) -> str:
        if float(base) == 2.0:
            return f"tl.exp2({u})"
        return f"exp({self.let(f'{u} * {math.log(float(base))!r}')})"

    def row(self, stage: RowWise, x: str) -> str:
        if stage.kind == "softmax":
            shown = self.let(f'tl.where(mask, {x}, float("-inf"))')
            top = self.let(f"tl.max({shown}, 1, keep_dims=True)")
            e = self.let(f"exp({self.let(f'{shown} - {top}')})")
            return self.let(f"{e} / {self._row_sum(e)}")
        return self.let(f"{self._shown(x)} / {self._guarded(stage, self._norm(stage, x))}")

    def row_gradient(self, stage: RowWise, x: str, y: str, g: str) -> str:
        g = self._shown(g)
        product = self._row_sum(self.let(f"{g} * {y}"))
        if stage.kind == "softmax":
            return self.let(f"{y} * {self.let(f'{g} - {product}')}")
        norm, x = self._norm(stage, x), self._shown(x)
        guarded = self._guarded(stage, norm)
        if stage.kind == "l1":
            slope = self.let(f"sign({x})")
        else:
            slope = self.let(f"{x} / {self.let(f'tl.where({norm} > 0.0, {norm}, 1.0)')}")
        if stage.guard == "max" and stage.eps:
            product = self.let(f"tl.where({norm} >= {stage.eps!r}, {product}, 0.0)")
        difference = self.let(f"{g} - {self.let(f'{slope} * {product}')}")
        return self.let(f"{difference} / {guarded}")

    def _shown(self, x: str) -> str:
        """What is summed: outside the mask may be NaN, or what a stage has made of 0."""
        return self.let(f"tl.where(mask, {x}, 0.0)")

    def _row_sum(self, x: str) -> str:
        return self.let(f"tl.sum({x}, 1, keep_dims=True)")

    def _norm(self, stage: RowWise, x: str) -> str:
        x = self._shown(x)
        if stage.kind == "l1":
            return self._row_sum(self.let(f"tl.abs({x})"))
        return self.let(f"tl.sqrt({self._row_sum(self.let(f'{x} * {x}'))})")

    def _guarded(self, stage: RowWise, norm: str) -> str:
        if not stage.eps:
            return norm
        if stage.guard == "add":
            return self.let(f"{norm} + {stage.eps!r}")
        return self.let(f"tl.where({norm} < {stage.eps!r}, {stage.eps!r}, {norm})")
