"""Verification on a GPU: its random numbers, CUDA graphs, and a backward that runs in a thread of
autograd's own.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv, self.p = nn.Linear(128, 384), p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return x + F.dropout(out.transpose(1, 2).flatten(2), self.p, self.training)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_verified_training_step(mode, p, caplog):
    """Four steps, each verified: nothing is found, and the gradients are those of eager."""
    model = Block(p).to("cuda", torch.bfloat16)
    x = torch.randn(2, 1024, 128, device="cuda", dtype=torch.bfloat16)
    options = {"verify": "always", "strict": True, **({"mode": mode} if mode else {})}
    run = torch.compile(model, backend="bla", options=options)
    for step in range(4):
        grads = []
        for function in (run, model):
            torch.manual_seed(step)
            grads.append(torch.autograd.grad(function(x).float().square().mean(), model.qkv.weight))
        (ours,), (eager,) = grads
        assert (ours - eager).norm() < 0.02 * eager.norm()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
