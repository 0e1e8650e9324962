"""Shapes and memory orders: broadcasting of batch dims and dense allocation, without guards on
symbolic sizes.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

ROW = 16  # bytes that the kernels read at a time
Size = TypeVar("Size")  # an int, or an expression of Inductor's


def known(condition: object) -> bool:
    """True if `condition` (a bool or a SymBool) is known to hold without asking for a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)  # type: ignore[arg-type]


def broadcast(shapes: Iterable[Sequence[int]]) -> list[int]:
    """The common shape of equally long `shapes` whose sizes are equal or 1."""
    return [next((s for s in sizes if not known(s == 1)), 1) for sizes in zip(*shapes, strict=True)]


def query_batch(tensors: Sequence[Tensor | None]) -> list[int]:
    """The batch shape of the result, from (q, k, v, q_norm, k_norm, key_weight)."""
    *matrices, weight = tensors
    return _batch(matrices, weight)


def key_batch(
    k: Tensor, v: Tensor, k_norm: Tensor | None = None, key_weight: Tensor | None = None
) -> list[int]:
    """The batch shape of the state and of the key sum."""
    return _batch((k, v, k_norm), key_weight)


def _batch(matrices: Sequence[Tensor | None], weight: Tensor | None) -> list[int]:
    shapes = [t.shape[:-2] for t in matrices if t is not None]
    return broadcast(shapes if weight is None else [*shapes, weight.shape[:-1]])


def empty_dense(
    like: Tensor, sizes: Sequence[int], dtype: torch.dtype, order: Sequence[int] | None
) -> Tensor:
    """Uninitialised, of `sizes`, dense in memory with its dims in `order`, outermost first."""
    if order is None:
        return torch.empty(sizes, dtype=dtype, device=like.device)
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    memory = torch.empty([sizes[d] for d in order], dtype=dtype, device=like.device)
    return memory.permute(inverse)


def dense_strides(sizes: Sequence[Size], order: Sequence[int]) -> list[Size | int]:
    """Those of dense memory with its dims in `order`, outermost first."""
    strides: list[Size | int] = list(sizes)
    reach: Any = 1
    for d in reversed(order):
        strides[d], reach = reach, reach * sizes[d]
    return strides


def dense_order(x: Tensor) -> list[int]:
    """The dims of x from the largest stride to the smallest: the order in which a gradient of x is
    laid out.

    Contiguous where x repeats memory, or where symbolic strides have no known order.
    """
    strides = x.stride()
    identity = list(range(x.dim()))
    if any(known(s == 0) for s in strides):
        return identity
    order: list[int] = []
    for dim in identity:
        position = len(order)
        while position and not known(strides[order[position - 1]] >= strides[dim]):
            if not known(strides[order[position - 1]] <= strides[dim]):
                return identity
            position -= 1
        order.insert(position, dim)
    return order


def reduce_batch(x: Tensor, batch: Sequence[int]) -> Tensor:
    """Sum the batch dims of x that were broadcast from size 1, down to `batch`."""
    dims = [i for i, size in enumerate(batch) if size == 1 and x.shape[i] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def readable(x: Tensor, unit: int = 0) -> bool:
    """Whether the kernels can read x (…, tokens, features) 16 bytes at a time along the features,
    for any address of x that is a multiple of 16. (`kernels.batch.aligned` says why they must.)

    unit: what strides have to be multiples of, where 16 bytes are not enough.
    """
    unit = unit or ROW // x.element_size()
    pairs = zip(x.shape, x.stride(), strict=True)
    wide = [known(size == 1) or known(stride % unit == 0) for size, stride in pairs]
    return known(x.stride(-1) == 1) and all(wide[:-1])
