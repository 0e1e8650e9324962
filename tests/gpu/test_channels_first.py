"""Operands whose rows, not their features, are contiguous, on a GPU: the compiled graph reads them
where they are; the call, which copies them, is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from bla_inductor import cost, lowering, lowering_cuda
from tests.gpu.test_lowering import FORMULA, assert_same, bla

pytestmark = pytest.mark.gpu
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cost, "READS_CHANNELS_FIRST", True)
    lowering.register()
    lowering_cuda._reported.clear()
    with config.patch(force_disable_caches=True):
        yield


def of_image(x: Tensor, d: int) -> Tensor:
    return x.unflatten(1, (-1, d)).mT


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("n", [128, 300, 4096, 5000])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
def test_values_and_gradients(dtype: torch.dtype, d: int, n: int, normalized: bool) -> None:
    if dtype == fp32 and d > 64:
        pytest.skip("a backward in tiles")
    formula = dict(FORMULA)
    if not normalized:
        formula = {"q_map": "softmax", "scale": d**-0.5}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (of_image(x, d) for x in (q, k, v))
        out = bla.linear_attention(q, k, v, **formula, out_order=[0, 1, 3, 2])
        return out.mT.flatten(1, 2)

    shape = (2, 3 * d, n)
    args = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    codes = assert_same(attention, args)
    assert any(f"GROUP : tl.constexpr = {group}" in c for c in codes for group in (2, 4, 8))


def test_one_operand_of_three() -> None:
    """v of a convolution beside q and k of a projection."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bla.linear_attention(q, k, of_image(v, 64), **FORMULA)

    shapes = [(2, 3, 4096, 64), (2, 3, 4096, 64), (2, 192, 4096)]
    args = [torch.randn(s, device="cuda").to(bf16).requires_grad_() for s in shapes]
    assert_same(attention, args)
