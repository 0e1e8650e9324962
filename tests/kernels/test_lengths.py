"""A new sequence length compiles nothing, but once for all lengths that 16 divides and once for the
others: that is all that Triton is told of one, whatever the layout. With head dims that 16 does not
divide, and heads outside of tokens, it is told as much of the distance from head to head. Large
tensors have kernels of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import ahead_of_time
from bla_inductor.kernels import heuristics

from bla_inductor import kernels
from bla_inductor.ops.layout import key_batch

bf16 = torch.bfloat16
RELU = "Piecewise((x, x > 0), (0, True))"
LENGTHS = (*range(1025, 1101), 1536, 2048, 2049)
LONG = (4096, 5000, 16384, 16400, 30001, 65536, 131072)  # in several programs a head


def _heads_inside(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, 8, n, d, dtype=dtype, device="meta")


def _tokens_outside(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, n, 8, d, dtype=dtype, device="meta").transpose(1, 2)


def _launches(n: int, d: int, dtype: torch.dtype, make: Any, masked: bool) -> Iterable[Any]:
    def call() -> None:
        q, k, v, out = (make(n, d, dtype) for _ in range(4))
        mask = torch.empty(2, 1, n, dtype=torch.bool, device="meta") if masked else None
        numbers = ((RELU, RELU, "", ""), "add", 0.5, 0.5, 0.5)
        state, key_sum = kernels.forward(
            out, q, k, v, None, None, mask, key_batch(k, v, None, mask), *numbers
        )
        grads = [*map(torch.empty_like, (q, k, v)), None, None, None]
        do = torch.empty_like(out)
        kernels.backward(grads, do, q, k, v, None, None, mask, state, key_sum, *numbers)

    return ahead_of_time.record(call)


def _tile(launch: Any) -> Any:
    constants = dict(launch.constants)
    shape = tuple(constants.get(name) for name in ("BLOCK_N", "BLOCK_D", "BLOCK_V", "TMA"))
    return *shape, launch.num_warps, launch.num_stages


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [_heads_inside, _tokens_outside])
@pytest.mark.parametrize(("d", "dtype"), [(64, bf16), (72, bf16), (128, bf16), (32, torch.float32)])
def test_few_variants_of_every_kernel(d, dtype, make, masked, monkeypatch) -> None:
    monkeypatch.setattr(heuristics, "capability", lambda device: 9)
    lengths: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    # Partial states of 72·72 + 72 numbers are no multiple of 16 apart, whole ones are.
    taken = LENGTHS + LONG if d % 16 == 0 else LENGTHS
    for n in taken:
        for launch in _launches(n, d, dtype, make, masked):
            lengths[launch.name, _tile(launch)][launch].append(n)
    names = [name for name, _ in lengths]
    assert len(set(names)) >= 4
    assert max(map(names.count, names)) <= 2  # one tile for large tensors, one for others
    known = {(n % 16 == 0, n * d % 16 == 0) for n in taken}  # of the length, of a head's stride
    for name, variants in lengths.items():
        assert len(variants) <= len(known), f"{name}: {list(variants.values())}"
