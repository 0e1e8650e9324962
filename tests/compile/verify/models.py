"""What the tests of `verify` compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SHAPE = (2, 3, 24, 8)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(count: int = 3) -> list[Tensor]:
    return [torch.randn(SHAPE, requires_grad=True) for _ in range(count)]


def compiled(function: Callable[..., Any], verify: str = "first", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(
        function,
        backend="bla",
        options={"inner": "eager", "verify": verify, **options},
        fullgraph=True,
        dynamic=dynamic,
    )


class Block(nn.Module):
    """A residual block with everything that a second run could disturb."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        y = attention(*self.qkv(x).chunk(3, -1))
        y = F.dropout(y, self.p, self.training)
        return x + self.norm(y.flatten(0, 1)).view_as(x)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("bla_inductor")]
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v).masked_fill(q < 0, float("-inf"))


def several(q: Tensor, k: Tensor, v: Tensor) -> Any:
    out = attention(q, k, v)
    return {"out": out, "none": None, "n": q.shape[-2], "best": out.argmax(-1), "of": (out.sum(),)}


def in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.float(), k.float(), v.float()).to(q.dtype)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def body(*args: Tensor) -> Tensor:
        return F.dropout(attention(*args), 0.5)

    return checkpoint(body, q, k, v, use_reentrant=False)


region = torch.compiler.nested_compile_region(attention)


def in_a_region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return region(q, k, v)


def on_a_condition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, attention, lambda q, k, v: v * 2.0, (q, k, v))


def with_random_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    noise = torch.randn_like(q) + torch.rand(q.shape[-1])
    return F.dropout(attention(q + noise, k, v), 0.3) * torch.bernoulli(torch.full_like(v, 0.5))


def detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k.detach(), v)


def island(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q = F.linear(q, v[0, 0, :8])
    return attention(q.float(), k, v)


GRAPHS = [
    (masked, 4),
    (several, 6),
    (checkpointed, 4),
    (in_a_region, 4),
    (on_a_condition, 4),
    (with_random_numbers, 4),
    (detached, 4),
    (island, 4),
]
