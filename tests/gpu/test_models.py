"""Whole blocks trained on a GPU: every parameter's gradient by itself, since a wrong one hides in a
vector of all. Convolutions after the attention change how Inductor lays out what is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.models.checks import assert_same, stirred

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from zoo.focused_la import FocusedLinearAttention
from zoo.mlla import MLLABlock
from zoo.polaformer import PolaLinearAttention
from zoo.rala import RankAugmentedLinearAttention
from zoo.vssd import NonCausalSSD

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


class ConvolutionsAfter(nn.Module):
    """Linear attention and a gated feed-forward of convolutions, as in SANA. x (B, H, W, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, hidden = heads, 2 * dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.into = nn.Conv2d(dim, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q.relu(), k.relu(), v))
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-3)
        x = x + self.proj(out.transpose(1, 2).flatten(2)).view_as(x)
        image = F.silu(self.into(x.permute(0, 3, 1, 2)))
        image, gate = self.depthwise(image).chunk(2, 1)
        return x + self.out(image * F.silu(gate)).permute(0, 2, 3, 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions after": (lambda: ConvolutionsAfter(96, 3), (2, 16, 16, 96)),
    "convolutions after, one head": (lambda: ConvolutionsAfter(64, 1), (2, 16, 16, 64)),
    "focused_la": (lambda: FocusedLinearAttention(64, (16, 16), heads=2), (2, 256, 64)),
    "mlla": (lambda: MLLABlock(96, heads=3), (2, 16, 16, 96)),
    "polaformer": (lambda: PolaLinearAttention(64, (16, 16), heads=2), (2, 256, 64)),
    "rala": (lambda: RankAugmentedLinearAttention(96, heads=3), (2, 96, 16, 16)),
    "vssd": (lambda: NonCausalSSD(64, state=32, head_dim=32), (2, 16, 16, 64)),
}


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name: str) -> None:
    make, shape = MODELS[name]
    module = stirred(make()).to(DEVICE)
    assert isinstance(module, nn.Module)
    counters.clear()
    run = torch.compile(module, backend="bla", options={"rewrite": "always"}, fullgraph=True)
    assert_same(run, module, ([torch.randn(shape, device=DEVICE)], {}))
    assert counters["bla"]["matched"] > 0
