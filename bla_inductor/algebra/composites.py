"""Composite operators, taken whole.

Below autograd torch dissolves `flatten`, `linear` or `conv2d` into smaller operators. Where the
outcome is known it need not: under symbolic sizes the shape arithmetic of the small ones costs
milliseconds a node. The table says a composite operator in an operator that the rules know, or
leaves it as it is where it has a rule of its own, or where it ends in an operator that no rule
looks into (a convolution, a norm). What is not in the table is dissolved.

Rules here: matmul, linear and einsum as contractions, whatever the ranks; repeat_interleave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch

from bla_inductor.algebra.index import Index, as_size, equal
from bla_inductor.algebra.product_rules import contracted, operand
from bla_inductor.algebra.registry import Lookup, Result, Unruled, rule
from bla_inductor.algebra.sum_rules import added
from bla_inductor.algebra.term import Value

__all__ = ["Call", "Dissolve", "is_composite", "whole"]

aten = torch.ops.aten
Call: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Dissolve(Unruled):
    """This use of a composite operator means something only after torch has dissolved it."""


def whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call in operators that the rules know (or take for leaves); None: let torch dissolve it.

    func: an OpOverload. What is not composite is returned as it is.
    """
    packet = func.overloadpacket
    if not is_composite(func):
        return packet, args, kwargs
    say = _KNOWN.get(packet)
    try:
        return None if say is None else say(packet, *args, **kwargs)
    except TypeError:  # an overload or a keyword that the table does not know
        return None


@cache
def is_composite(func: Any) -> bool:
    """Whether torch says an operator in others, and has no derivative of its own for it."""
    if func.namespace == "prim":  # not in the dispatcher
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _itself(packet: Any, *args: Any, **kwargs: Any) -> Call:
    return packet, args, kwargs


def _becomes(target: Any, *more: Any) -> Callable[..., Call]:
    """`target` of all arguments, and of `more`."""
    return lambda _, *args, **kwargs: (target, (*args, *more), kwargs)


def _of_first(target: Any, *more: Any) -> Callable[..., Call]:
    """`target` of the first argument: the result's shape and dtype say the rest."""
    return lambda _, x, *args, **kwargs: (target, (x, *more), {})


def _softmax(_: Any, x: torch.Tensor, dim: Any, dtype: Any = None, **more: Any) -> Call | None:
    same = dtype in (None, x.dtype) and isinstance(dim, int) and not more
    return (aten._softmax, (x, dim, False), {}) if same else None


def _dropout(_: Any, x: torch.Tensor, p: float, train: bool) -> Call | None:
    return (aten.alias, (x,), {}) if not train or p == 0 else None


def _pad(packet: Any, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Call:
    if mode != "constant":
        return packet, (x, pad), {}
    return aten.constant_pad_nd, (x, pad, 0 if value is None else value), {}


def _narrow(_: Any, x: torch.Tensor, dim: int, start: Any, length: Any) -> Call | None:
    if not isinstance(start, int) or start < 0:
        return None
    return aten.slice, (x, dim, start, start + length), {}


def _pieces(_: Any, x: torch.Tensor, count: Any, dim: int = 0, **__: Any) -> Call:
    return aten.split, (x, count, dim), {}


def _adjoint(_: Any, x: torch.Tensor) -> Call | None:
    return None if x.dtype.is_complex or x.dim() < 2 else (aten.transpose, (x, -2, -1), {})


def _reversed(_: Any, x: torch.Tensor) -> Call:
    return aten.permute, (x, range(x.dim())[::-1]), {}


def _movedim(_: Any, x: torch.Tensor, source: Any, destination: Any) -> Call:
    rank = x.dim()
    pairs = [[source], [destination]] if isinstance(source, int) else [source, destination]
    moved, to = ([d % rank for d in dims] for dims in pairs)
    rest = iter(d for d in range(rank) if d not in moved)
    order = [moved[to.index(d)] if d in to else next(rest) for d in range(rank)]
    return aten.permute, (x, order), {}


_KNOWN: dict[Any, Callable[..., Call | None]] = {
    aten.matmul: _itself,
    aten.linalg_matmul: _becomes(aten.matmul),
    aten.linear: _itself,
    aten.einsum: _itself,
    aten.reshape: _itself,
    aten.contiguous: _itself,
    aten.flatten: _of_first(aten.view),
    aten.unflatten: _of_first(aten.view),
    aten.view_as: _of_first(aten.view),
    aten.reshape_as: _of_first(aten.view),
    aten.expand_as: _of_first(aten.expand),
    aten.broadcast_to: _of_first(aten.expand),
    aten.to: _of_first(aten._to_copy),
    aten.type_as: _of_first(aten._to_copy),
    aten.mT: _adjoint,
    aten.mH: _adjoint,
    aten.adjoint: _adjoint,
    aten.matrix_H: _adjoint,
    aten.numpy_T: _reversed,
    aten.swapaxes: _becomes(aten.transpose),
    aten.swapdims: _becomes(aten.transpose),
    aten.movedim: _movedim,
    aten.moveaxis: _movedim,
    aten.chunk: _pieces,
    aten.unsafe_chunk: _pieces,
    aten.tensor_split: _pieces,
    aten.split: _pieces,
    aten.narrow: _narrow,
    aten.repeat_interleave: _itself,
    aten.pad: _pad,
    aten.concat: _becomes(aten.cat),
    aten.concatenate: _becomes(aten.cat),
    aten.softmax: _softmax,
    aten.dropout: _dropout,
    aten.square: _becomes(aten.pow, 2),
    aten.multiply: _becomes(aten.mul),
    aten.divide: _becomes(aten.div),
    aten.true_divide: _becomes(aten.div),
    aten.subtract: _becomes(aten.sub),
    aten.negative: _becomes(aten.neg),
    aten.absolute: _becomes(aten.abs),
    aten.clip: _becomes(aten.clamp),
    aten.relu6: _becomes(aten.hardtanh, 0, 6),
    **dict.fromkeys(
        (
            aten.conv1d,
            aten.conv2d,
            aten.conv3d,
            aten.conv_transpose1d,
            aten.conv_transpose2d,
            aten.conv_transpose3d,
            aten.layer_norm,
            aten.group_norm,
            aten.batch_norm,
            aten.instance_norm,
            aten.rms_norm,
            aten.log_softmax,
            aten.prelu,
            aten.scaled_dot_product_attention,
            aten.upsample_linear1d,
            aten.upsample_nearest1d,
            aten.upsample_nearest2d,
            aten.upsample_nearest3d,
            aten.upsample_bilinear2d,
            aten.upsample_bicubic2d,
            aten.upsample_trilinear3d,
            aten.max_pool1d,
            aten.max_pool2d,
            aten.max_pool3d,
        ),
        _itself,
    ),
}


@rule(aten.repeat_interleave, layout=True)
def _repeat(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, count: Any = None, dim: Any = None, **_: Any
) -> Result:
    """Every entry `count` times: the axis merged with a new, minor one."""
    if not isinstance(count, int | torch.SymInt) or not isinstance(dim, int):
        raise Dissolve
    value, at, size = V(x), dim % x.dim(), as_size(count)
    new = () if equal(size, 1) else (Index(size),)
    axes = (*value.axes[:at], (*value.axes[at], *new), *value.axes[at + 1 :])
    return Value(value.term, axes, value.dtype)


@rule(aten.matmul)
def _matmul(V: Lookup, out: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Result:
    if x.dim() < 2 or y.dim() < 2:
        raise Dissolve
    rank = max(x.dim(), y.dim())
    a, b = operand(V, x, [x.dim() - 1]), operand(V, y, [y.dim() - 2])
    a, b = _of_rank(a, rank), _of_rank(b, rank)
    return contracted(a, b, {i: i for i in range(rank - 2)}, {rank - 1: rank - 2}, out.dtype)


def _of_rank(value: Value, rank: int) -> Value:
    return Value(value.term, ((),) * (rank - len(value.axes)) + value.axes, value.dtype)


@rule(aten.linear)
def _linear(
    V: Lookup, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any = None
) -> Result:
    """x[…, c] · weight[n, c] + bias[n]."""
    if x.dim() < 1 or weight.dim() != 2:
        raise Dissolve
    last = x.dim() - 1
    a, b = operand(V, x, [last]), operand(V, weight, [1])
    product = contracted(a, b, {}, {last: 1}, out.dtype)
    return product if bias is None else added(V, out, product, bias)


@rule(aten.einsum)
def _einsum(
    V: Lookup, out: torch.Tensor, equation: str, tensors: Sequence[torch.Tensor], **_: Any
) -> Result:
    """Two operands that share what is summed. Three, and a diagonal, are torch's to order."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    words = left.split(",")
    if not arrow or len(words) != 2:
        raise Dissolve
    a, b = (_letters(w, t.dim()) for w, t in zip(words, tensors, strict=True))
    result = _letters(right, out.dim())
    summed = {a.index(x): b.index(x) for x in a if x in b and x not in result}
    alone = [x for x in a + b if (x in a) != (x in b) and x not in result]
    if not summed or alone:
        raise Dissolve
    batch = {a.index(x): b.index(x) for x in a if x in b and x in result}
    x, y = tensors
    product = contracted(
        operand(V, x, summed), operand(V, y, summed.values()), batch, summed, out.dtype
    )
    if product is None:
        return None
    order = [a[i] for i in batch]
    order += [x for x in a if x not in b] + [x for x in b if x not in a]
    axes = tuple(product.axes[order.index(x)] for x in result)
    return Value(product.term, axes, product.dtype)


def _letters(word: str, rank: int) -> list[str | int]:
    """One letter a dim; those of `...` are numbered from the right, as they broadcast."""
    before, dots, after = word.partition("...")
    count = rank - len(before) - len(after)
    letters = [*before, *range(-count, 0), *after]
    if len(letters) != rank or len(set(letters)) != rank or (count and not dots):
        raise Dissolve
    return letters
