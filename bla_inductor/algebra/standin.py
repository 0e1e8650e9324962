"""Results of small operators inside one graph node, without computing them.

A node like `F.normalize` is several operators, and only the result of the last one was recorded.
On symbolic sizes a norm and a clamp take torch twenty milliseconds, and an empty tensor half of
one. What is made here has the shape, dtype and device of the real result but not its strides: the
node's result is the recorded one in the end. Views are never stood in for: they share memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bla_inductor.algebra.index import as_size, equal

__all__ = ["stand_in"]

aten = torch.ops.aten
_POINTWISE = {
    aten.abs,
    aten.add,
    aten.clamp,
    aten.clamp_min,
    aten.div,
    aten.exp,
    aten.mul,
    aten.neg,
    aten.pow,
    aten.reciprocal,
    aten.relu,
    aten.rsqrt,
    aten.sigmoid,
    aten.sqrt,
    aten.sub,
}
_REDUCTIONS = {aten.linalg_vector_norm: 2, aten.mean: 1, aten.sum: 1}  # where the dims stand


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A tensor like `func(*args, **kwargs)`; None where that is not plain to see.

    Plain are floating-point tensors of one dtype and device, at least one of a symbolic size. Their
    fake mode has to be active.
    """
    packet = func.overloadpacket
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    others = [a for a in (*args, *kwargs.values()) if not isinstance(a, torch.Tensor)]
    if not tensors or kwargs.keys() - {"alpha", "min", "max", "keepdim"}:
        return None
    first = tensors[0]
    like = (first.dtype, first.device)
    symbolic = any(isinstance(s, torch.SymInt) for t in tensors for s in t.shape)
    if not symbolic or any((t.dtype, t.device) != like or not t.dim() for t in tensors):
        return None
    if not first.dtype.is_floating_point or first.dtype.itemsize == 1:
        return None
    shape: Sequence[Any] | None = None
    if packet in _POINTWISE and all(isinstance(o, int | float | None) for o in others):
        shape = _broadcast([t.shape for t in tensors])
    elif packet in _REDUCTIONS and len(tensors) == 1:
        shape = _reduced(first, _REDUCTIONS[packet], args, kwargs)
    return None if shape is None else torch.empty(shape, dtype=like[0], device=like[1])


def _broadcast(shapes: Sequence[Sequence[Any]]) -> list[Any] | None:
    result: list[Any] = []
    for dim in range(1, 1 + max(map(len, shapes))):
        size: Any = 1
        for other in (s[-dim] for s in shapes if len(s) >= dim):
            if equal(as_size(size), 1):
                size = other
            elif not equal(as_size(other), 1) and not equal(as_size(size), as_size(other)):
                return None  # whether they are equal would have to be guessed
        result.insert(0, size)
    return result


def _reduced(
    x: torch.Tensor, at: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any] | None:
    dims = args[at] if len(args) > at else None
    if not isinstance(dims, list | tuple) or not dims or len(args) > at + 2:
        return None
    keep = kwargs.get("keepdim", args[at + 1] if len(args) > at + 1 else False)
    gone = {d % x.dim() for d in dims}
    return [1 if d in gone else s for d, s in enumerate(x.shape) if keep or d not in gone]
