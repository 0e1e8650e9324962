"""A template that Triton does not compile: found by Inductor's workers, long after the lowering."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from bla_inductor import failures
from bla_inductor.templates import launch, output

pytestmark = pytest.mark.gpu


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


@pytest.mark.parametrize("n", [128, 4096])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_operators_are_called(n: int, threads: int, monkeypatch: Any, caplog: Any) -> None:
    whole = launch.signature

    def uncompilable(views: Any) -> str:
        return f"{whole(views)}\n    tl.static_assert(1 == 2)"

    failures.forget()
    monkeypatch.setattr(launch, "signature", uncompilable)
    assert output.launch is launch
    leaves = [torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [x.requires_grad_() for x in leaves]
    with config.patch(compile_threads=threads, force_disable_caches=True):
        out = torch.compile(attention, backend="bla", options={"rewrite": "always"})(*leaves)
        got = torch.autograd.grad(out.float().square().sum(), leaves)
    expected = attention(*(x.double() for x in leaves))
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    for ours, true in zip((out, *got), (expected, *exact), strict=True):
        assert (ours.double() - true).norm() <= 2e-2 * true.double().norm()
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    told = [text for text in told if text.startswith("bla failed")]
    assert told
    assert all("called instead of fused" in text for text in told)
