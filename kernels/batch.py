"""Batch dims merged to two strides a tensor, and gradients of what was broadcast."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from bla_inductor.ops.layout import readable

Strides = tuple[int, ...]


class Batch:
    """The operands of one kernel, with the batch dims merged into two: batch index b is
    (b // inner, b % inner).

    reads, writes: tensors, None for what is absent. `tensors` and `strides` hold one entry for
    each, reads first; strides are the two of the batch, then the tensor's own two. What is absent
    has the first operand's pointer and strides of 0. Batch dims that do not merge (three and more
    unrelated strides) are resolved by contiguous copies; `finish` copies the outputs back.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor | None] = (),
    ) -> None:
        self._targets: list[tuple[Tensor, Tensor]] = []
        operands = [*reads, *writes]
        merged = _merge(sizes, [t for t in operands if t is not None])
        if merged is None:
            operands = [self._flat(t, sizes, i < len(reads)) for i, t in enumerate(operands)]
            sizes = [prod(sizes)]
            merged = _merge(sizes, [t for t in operands if t is not None])
            assert merged is not None
        self.count, self.inner, pairs = merged
        rank, pair = len(sizes), iter(pairs)
        self.strides: list[Strides] = [
            (0, 0, 0, 0) if t is None else (*next(pair), *t.stride()[rank:]) for t in operands
        ]
        first = operands[0]
        assert first is not None
        self.tensors: list[Tensor] = [first if t is None else t for t in operands]

    def _flat(self, t: Tensor | None, sizes: Sequence[int], read: bool) -> Tensor | None:
        if t is None:
            return None
        own = t.shape[len(sizes) :]
        if read:
            return t.expand(*sizes, *own).reshape(-1, *own)
        self._targets.append((t, t.new_empty(prod(sizes), *own)))
        return self._targets[-1][1]

    def big(self, rows: int) -> bool:
        """Whether an offset within a tile of `rows` may leave int32."""
        return any(rows * abs(s[2]) + 256 * abs(s[3]) >= 2**31 for s in self.strides if len(s) == 4)

    def finish(self) -> None:
        for target, temporary in self._targets:
            target.copy_(temporary.view(target.shape))


def _merge(
    sizes: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[int, int, list[tuple[int, int]]] | None:
    merged: list[tuple[int, list[int]]] = []
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        strides = [0 if t.shape[i] == 1 else t.stride(i) for t in tensors]
        if merged and all(a == b * size for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, [0] * len(tensors)))
    (outer, outer_strides), (inner, inner_strides) = merged
    return outer * inner, inner, list(zip(outer_strides, inner_strides, strict=True))


def aligned(x: Tensor | None) -> Tensor | None:
    """x, or a copy in padded rows unless its features are contiguous and all rows aligned.

    Triton knows of a stride that it is 1, or a multiple of 16, or nothing. Reading 40 or 72
    features a head element by element takes longer than the copy (H100: 18 % of the copy
    bandwidth). And where tiles are not read 16 bytes at a time along the features, Triton 3.6 makes
    kernels whose products with 16 columns (Σ k, Σ dz·q) read beyond the end of shared memory, as
    compute-sanitizer shows: wrong results, or an illegal access.
    """
    if x is None or (x.data_ptr() % 16 == 0 and readable(x, 16)):
        return x
    features = x.shape[-1]
    copy = x.new_empty([*x.shape[:-1], -(-features // 16) * 16])[..., :features]
    return copy.copy_(x)


class Gradients:
    """Buffers with a pass's full batch for gradients whose input was broadcast, summed into them at
    the end.
    """

    def __init__(self, batch: Sequence[int]) -> None:
        self._batch = list(batch)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def full(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or list(grad.shape[:-2]) == self._batch:
            return grad
        buffer = grad.new_empty([*self._batch, *grad.shape[-2:]], dtype=torch.float32)
        self._pending.append((grad, buffer))
        return buffer

    def finish(self) -> None:
        for grad, buffer in self._pending:
            dims = [i for i, s in enumerate(grad.shape[:-2]) if s != self._batch[i]]
            grad.copy_(buffer.sum(dims, keepdim=True))


def reduced(x: Tensor, batch: Sequence[int]) -> Tensor:
    """x with the batch dims that `batch` broadcasts summed, in torch's fixed order."""
    dims = [i for i, size in enumerate(batch) if size != x.shape[i]]
    return x.sum(dims, keepdim=True) if dims else x
