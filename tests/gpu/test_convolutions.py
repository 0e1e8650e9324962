"""Attention between 1 × 1 convolutions, on a GPU: images, which Inductor lays out with their
channels last, and with them every 4-D tensor between, also what is kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from tests.numerics import assert_no_less_accurate

pytestmark = pytest.mark.gpu
D, HEADS, CHANNELS = 32, 4, 64


def projected(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """q, k, v (B, heads, D, N)."""
    return tuple(t.unflatten(1, (-1, D)).flatten(3) for t in F.conv2d(x, weight).chunk(3, 1))


def image(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(out.flatten(1, 2).unflatten(2, x.shape[2:]), weight)


def softmax_of_the_keys(x: Tensor, weight: Tensor, last: Tensor, memory: Tensor) -> Tensor:
    """With heads and batch as one dim, as gsa-pytorch has them."""
    q, k, v = (t.flatten(0, 1) for t in projected(x, weight))
    state = torch.einsum("ndm,nem->nde", k.softmax(-1), v)
    out = torch.einsum("nde,ndm->nem", state, q).unflatten(0, (len(x), -1))
    return image(out, x, last)


def with_memory(x: Tensor, weight: Tensor, last: Tensor, memory: Tensor) -> Tensor:
    """More keys than queries, as in denoising-diffusion-pytorch."""
    q, k, v = projected(x, weight)
    more = memory.unsqueeze(1).expand(-1, len(x), -1, -1, -1)
    k, v = torch.cat((more[0], k), -1), torch.cat((more[1], v), -1)
    q, k = q.softmax(-2) * D**-0.5, k.softmax(-1)
    state = torch.einsum("bhdn,bhen->bhde", k, v)
    return image(torch.einsum("bhde,bhdn->bhen", state, q), x, last)


def normalised(x: Tensor, weight: Tensor, last: Tensor, memory: Tensor) -> Tensor:
    q, k, v = projected(x, weight)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return image((v @ k.mT) @ q / (k.sum(-1).unsqueeze(-2) @ q + 1e-6), x, last)


def three_convolutions(x: Tensor, weight: Tensor, last: Tensor, memory: Tensor) -> Tensor:
    """With values that a depthwise convolution reads as well (LePE)."""
    parts = [F.conv2d(x, w) for w in weight.chunk(3)]
    q, k, v = (t.unflatten(1, (-1, D)).flatten(3) for t in parts)
    out = (v @ k.softmax(-1).mT) @ F.elu(q)
    kernel = last.mean(0).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    beside = F.conv2d(parts[2], kernel, padding=1, groups=HEADS * D)
    return image(out + beside.view_as(out), x, last)


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "function", [softmax_of_the_keys, with_memory, normalised, three_convolutions]
)
def test_values_and_gradients(
    function: Callable[..., Tensor], dtype: torch.dtype, side: int
) -> None:
    shapes = [
        (4, CHANNELS, side, side),
        (3 * HEADS * D, CHANNELS, 1, 1),
        (CHANNELS, HEADS * D, 1, 1),
        (2, HEADS, D, 4),
    ]
    args = [torch.randn(s, device="cuda").mul(s[1] ** -0.5).to(dtype) for s in shapes]
    args = [x.requires_grad_() for x in args]
    if function is not with_memory:
        args[-1].requires_grad_(False)
    counters.clear()
    run = torch.compile(function, backend="bla", options={"rewrite": "always"}, fullgraph=True)
    assert_no_less_accurate(run, function, args, factor=1.5, roundings=8.0)
    assert counters["bla"]["matched"] == 1
