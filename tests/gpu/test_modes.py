"""CUDA graphs, and packages of AOTInductor: the kernels replayed and called from elsewhere."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.export import Dim, export

from bla_inductor import rewrite_exported
from tests.numerics import assert_within_budget

pytestmark = pytest.mark.gpu


def attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v)


def tensors(n: int = 1024, grad: bool = True) -> list[torch.Tensor]:
    shape = (2, 4, n, 64)
    made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_(grad) for x in made]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_replayed_graph_computes_what_eager_kernels_do(training: bool) -> None:
    """Bitwise, on new data in every replay."""
    graphs = torch.compile(attention, backend="bla", mode="reduce-overhead", fullgraph=True)
    plain = torch.compile(attention, backend="bla", fullgraph=True)
    for _ in range(5):  # warm up, record, and replay three times
        args = tensors(grad=training)
        torch.compiler.cudagraph_mark_step_begin()
        results = []
        for run in (graphs, plain):
            out = run(*args)
            made = [out]
            if training:
                made += torch.autograd.grad(out, args, torch.ones_like(out))
            results.append([x.detach().clone() for x in made])
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
    assert counters["bla"]["matched"] == 2
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="AOTInductor needs the CUDA toolkit")
def test_a_package_of_aot_inductor(tmp_path) -> None:
    """The package calls the kernels; one of symbolic length."""
    n = Dim("n", min=16, max=65536)
    shapes = {"q": {2: n}, "k": {2: n}, "v": {2: n}}
    program = export(Attention(), tuple(tensors(grad=False)), dynamic_shapes=shapes)
    rewritten = rewrite_exported(program, {"strict": True})
    path = torch._inductor.aoti_compile_and_package(
        rewritten, package_path=str(tmp_path / "package.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for length in (1024, 700):
        args = tensors(length, grad=False)
        exact = attention(*(x.double() for x in args))
        assert_within_budget("output", run(*args), attention(*args), exact)
