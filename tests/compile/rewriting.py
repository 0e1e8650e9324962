"""What the tests of the rewrite share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import bla_inductor
from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite

SHAPE = (2, 3, 20, 8)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(s).requires_grad_(grad) for s in shapes or (SHAPE,) * 3]


def compiled(function, **kwargs):
    counters.clear()
    return torch.compile(
        function, backend="bla", options={"inner": "aot_eager"}, fullgraph=True, **kwargs
    )


def matched() -> int:
    return counters["bla"]["matched"]


class Graphs:
    """A backend that rewrites, keeps the graph for inspection, and runs it as it is."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []
        self.report = bla_inductor.Report()

    def __call__(self, gm, inputs):
        self.report += rewrite(gm, inputs, Options())
        self.modules.append(gm)
        return gm.forward

    def targets(self) -> list[str]:
        return [str(n.target) for gm in self.modules for n in gm.graph.nodes]
