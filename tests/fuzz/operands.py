"""Operands: tensors of any layout, and calls of the operators on them.

The first value of every choice is the plainest, so that hypothesis shrinks a failure to what
matters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from feature_map_table import PHI
from linear_attention_formula import plain

__all__ = ["Call", "Layout", "calls", "layouts", "needed_gradients", "plain_of"]

# Finite for every real number, and their slopes too. A sum over positive ones may be divided by.
POSITIVE = ("", "elu + 1", "exp", "sigmoid", "softmax")
ANY = (
    "elu", "relu", "silu", "tanh", "gelu", "leaky relu", "square", "hard swish", "softplus",
    "l2 max", "l1 add", "scaled softmax", "relu, l2", "softmax, square",
)  # fmt: skip
MAPS = {"": "", **{name: text for name, (text, _) in PHI.items()}}


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie in its storage.

    order: the dims from outermost to innermost; before: elements left out before the first, and
    step: from one element to the next, along each dim; repeated: dims that are expanded (stride
    0); window: rows overlap, each starting so many elements after the one before (0: they do not).
    """

    order: tuple[int, ...]
    before: tuple[int, ...]
    step: tuple[int, ...]
    repeated: tuple[bool, ...]
    window: int = 0

    def base_shape(self, shape: tuple[int, ...]) -> list[int]:
        """The shape of the dense tensor that a tensor of `shape` is a view of."""
        sizes = [
            before + (1 if repeated and size else size) * step
            for size, before, step, repeated in zip(
                shape, self.before, self.step, self.repeated, strict=True
            )
        ]
        if self.window:
            return [*sizes[:-2], self.before[-1] + (shape[-2] - 1) * self.window + shape[-1]]
        return [sizes[dim] for dim in self.order]

    def view(self, base: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of `shape` in `base`, by differentiable views."""
        if self.window:
            x = base[..., self.before[-1] :].unfold(-1, shape[-1], self.window)
            rows = (slice(None), slice(None))
        else:
            inverse = [self.order.index(dim) for dim in range(len(shape))]
            x = base.permute(inverse)
            rows = ()
        cut = [
            slice(before, None, step) for before, step in zip(self.before, self.step, strict=True)
        ]
        x = x[tuple(cut[: len(cut) - len(rows)] + list(rows))]
        return x.expand(shape)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Layout:
    """Any layout of a tensor of `shape`."""
    rank = len(shape)
    dims, plain = range(rank), (0,) * rank
    kind = draw(st.sampled_from(("dense", "order", "slice", "expand", "window", "all")))
    order, before, step, repeated = tuple(dims), plain, (1,) * rank, (False,) * rank
    if kind in ("order", "all"):
        order = tuple(draw(st.permutations(list(dims))))
    if kind in ("slice", "all"):
        before = tuple(draw(st.sampled_from((0, 1, 8))) for _ in dims)
        step = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in dims)
    if kind in ("expand", "all"):
        repeated = tuple(draw(st.booleans()) for _ in dims)
    window = 0
    if kind == "window" and rank > 1 and min(shape[-2:]) > 0:
        window = draw(st.integers(1, shape[-1]))
    return Layout(order, before, step, repeated, window)


@dataclass(frozen=True)
class Call:
    """A call of `bla::linear_attention`: shapes, layouts, options. A shape of () is no tensor."""

    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout | None, ...]
    incoming: Layout
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype | None
    out_order: tuple[int, ...] | None
    maps: tuple[str, str, str, str]
    positive: frozenset[int]
    normalizer: str
    scale: float
    norm_scale: float
    eps: float
    upcast: bool
    needs: tuple[bool, ...]
    seed: int

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]
        return "Call(\n    " + ",\n    ".join(told) + ",\n)"

    def keywords(self) -> dict[str, Any]:
        """The formula's options, which the plain formula takes too."""
        names = ("q_map", "k_map", "q_norm_map", "k_norm_map")
        maps = {n: MAPS[m] for n, m in zip(names, self.maps, strict=True) if m}
        numbers = {"normalizer": self.normalizer, "scale": self.scale}
        if self.normalizer != "none":
            numbers |= {"norm_scale": self.norm_scale, "eps": self.eps}
        return maps | numbers

    def options(self) -> dict[str, Any]:
        """All options of the operator."""
        order = None if self.out_order is None else list(self.out_order)
        beside = {"out_dtype": self.out_dtype, "out_order": order, "upcast": self.upcast}
        return self.keywords() | beside

    def bases(self) -> list[Tensor | None]:
        """The dense tensors behind q, k, v, q_norm, k_norm, key_weight."""
        generator = torch.Generator().manual_seed(self.seed)
        made: list[Tensor | None] = []
        for i, (shape, layout) in enumerate(zip(self.shapes, self.layouts, strict=True)):
            if layout is None:
                made.append(None)
                continue
            x = torch.randn(layout.base_shape(shape), generator=generator, dtype=torch.float64)
            if i == 5:
                x = x > -0.5 if self.weight_dtype == torch.bool else x.abs() + 0.1
            elif i in self.positive:
                x = x.abs() + 0.1
            made.append(x.to(self.weight_dtype if i == 5 else self.dtype))
        return made

    def views(self, bases: list[Any]) -> list[Any]:
        """The operands in their bases."""
        return [
            None if layout is None else layout.view(base, shape)
            for base, layout, shape in zip(bases, self.layouts, self.shapes, strict=True)
        ]

    def gradient(self) -> Tensor:
        """The incoming gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        size = self.incoming.base_shape(self.out_shape)
        base = torch.randn(size, generator=generator, dtype=torch.float64)
        return self.incoming.view(base.to(self.out_dtype or self.dtype), self.out_shape)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    lengths: tuple[int, ...] = (5, 1, 0, 2, 3, 17, 40),
    channels: tuple[int, ...] = (4, 1, 0, 2, 3, 8, 17),
    smooth: bool = False,
) -> Call:
    """Any call; with `smooth`, of formulas whose derivatives have no jumps."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    rank = pick(2, 1, 0, 3)
    batch = [pick(2, 1, 3, *([0] if 0 in lengths else [])) for _ in range(rank)]
    n, m = draw(st.sampled_from(lengths)), draw(st.sampled_from(lengths))
    d, dv, dn = (draw(st.sampled_from(channels)) for _ in range(3))
    normalizer = pick("none", "add", *([] if smooth else ["clamp"]))
    norms = pick("none", "both", "q", "k") if normalizer != "none" else "none"
    dn = dn if norms == "both" else d

    def sizes(*last: int) -> tuple[int, ...]:
        return (*(1 if draw(st.booleans()) else size for size in batch), *last)

    weight_dtype = pick(None, torch.bool, torch.float32, torch.float16, torch.float64)
    shapes = (
        sizes(n, d),
        sizes(m, d),
        sizes(m, dv),
        sizes(n, dn) if norms in ("both", "q") else (),
        sizes(m, dn) if norms in ("both", "k") else (),
        sizes(m) if weight_dtype else (),
    )
    given = [i < 3 or bool(shape) for i, shape in enumerate(shapes)]
    dtype = draw(st.sampled_from(dtypes))
    low = dtype.itemsize == 2
    upcast = low and pick(False, True)
    known = [s[:-2] for s in shapes[:5] if s] + ([shapes[5][:-1]] if weight_dtype else [])
    out_shape = (*torch.broadcast_shapes(*known), n, dv)
    # A sum that is divided by must not be close to zero: of positive features, or guarded by far.
    divides = {0: norms not in ("both", "q"), 1: norms not in ("both", "k"), 3: True, 4: True}
    positive = [i for i in divides if normalizer == "add" and divides[i]]
    maps = dict.fromkeys(divides, "")
    for i in maps:
        if given[i]:
            maps[i] = pick(*POSITIVE, *([] if smooth or i in positive else ANY))
    stored = tuple(
        draw(layouts(shape)) if is_given else None
        for is_given, shape in zip(given, shapes, strict=True)
    )
    needs = tuple(
        is_given and not (i == 5 and weight_dtype == torch.bool) and draw(st.booleans())
        for i, is_given in enumerate(given)
    )
    return Call(
        shapes,
        stored,
        draw(layouts(out_shape)),
        out_shape,
        dtype,
        weight_dtype or torch.bool,
        torch.float32 if low and not upcast and pick(False, True) else None,
        tuple(draw(st.permutations(list(range(len(out_shape)))))) if pick(False, True) else None,
        (maps[0], maps[1], maps[3], maps[4]),
        frozenset(i for i in positive if not maps[i]),
        normalizer,
        pick(1.0, 0.3),
        pick(1.0, 0.25),
        pick(0.5, 0.125) if normalizer == "clamp" else pick(0.5, 1e-3),
        upcast,
        needs,
        draw(st.integers(0, 99)),
    )


NAMES = ("dq", "dk", "dv", "dq_norm", "dk_norm", "dkey_weight")


def needed_gradients(out: Tensor, leaves: list[Any], do: Tensor) -> dict[str, Tensor]:
    """The gradient of each leaf that requires one, by name."""
    wanted = {n: x for n, x in zip(NAMES, leaves, strict=True) if x is not None and x.requires_grad}
    if not wanted:
        return {}
    grads = torch.autograd.grad(out, list(wanted.values()), do.to(out.dtype))
    return dict(zip(wanted, grads, strict=True))


def plain_of(call: Call, wide: bool = False) -> Callable[[list[Any]], dict[str, Tensor]]:
    """The formula as its user writes it, in the call's dtype, or in fp64: from operands to the
    output and the needed gradients.
    """
    result = call.out_dtype or call.dtype
    inside = torch.float32 if call.upcast else result
    do = call.gradient()

    def results(operands: list[Any]) -> dict[str, Tensor]:
        leaves = [
            x if x is None else (x.double() if wide and x.is_floating_point() else x).detach()
            for x in operands
        ]
        leaves = [
            x if x is None else x.requires_grad_(need)
            for x, need in zip(leaves, call.needs, strict=True)
        ]
        if wide:
            out = plain(*leaves, **call.keywords())
            return {"out": out, **needed_gradients(out, leaves, do.double())}
        *tensors, weight = leaves
        weight = weight if weight is None else weight.to(inside)
        out = plain(*tensors, weight, **call.keywords(), out_dtype=inside).to(result)
        return {"out": out, **needed_gradients(out, leaves, do)}

    return results
