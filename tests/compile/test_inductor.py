"""What Inductor makes of the operator: loops of its own, or a call where it is not decomposed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from bla_inductor import lowering
from tests.numerics import assert_no_less_accurate

pytestmark = pytest.mark.slow


def linear(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
    return out.transpose(1, 2).flatten(2)


def quadratic(q, k, v):
    scores = F.relu(q) @ F.relu(k).mT
    return (scores / (scores.sum(-1, keepdim=True) + 1e-6)) @ v


def tensors(n: int = 24, grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, 3, n, 8).requires_grad_(grad) for _ in range(3)]


def code_of(function, *args) -> str:
    options = {"fx_graph_cache": False}
    with torch.no_grad():
        run = torch.compile(function, backend="bla", options=options, fullgraph=True)
        _, (code, *_) = run_and_get_code(run, *args)
    return code.split("def call")[-1]


@pytest.mark.parametrize("function", [linear, quadratic])
def test_values_and_gradients(function) -> None:
    run = torch.compile(function, backend="bla", fullgraph=True)
    assert_no_less_accurate(run, function, tensors())


def test_symbolic_lengths() -> None:
    run = torch.compile(linear, backend="bla", fullgraph=True, dynamic=True)
    for n in (24, 31):
        assert_no_less_accurate(run, linear, tensors(n))


def test_on_a_cpu_the_operator_dissolves_and_the_n_by_m_matrix_is_gone() -> None:
    code = code_of(quadratic, *tensors(200, grad=False))
    assert "torch.ops.bla" not in code
    assert code.count("extern_kernels.bmm(") == 2
    assert "(6, 200, 200)" not in code


def test_where_it_is_not_decomposed_it_is_one_call(monkeypatch) -> None:
    """As on CUDA: one call of the operator, and no copies before or after it."""
    monkeypatch.setattr(lowering, "_stays_a_call", lambda x: True)
    args = tensors(grad=False)
    code = code_of(linear, *args)
    assert code.count("torch.ops.bla.linear_attention.default(") == 1
    assert "extern_kernels" not in code
    assert "copy" not in code


def test_gradients_where_it_is_not_decomposed(monkeypatch) -> None:
    monkeypatch.setattr(lowering, "_stays_a_call", lambda x: True)
    options = {"fx_graph_cache": False}
    run = torch.compile(linear, backend="bla", options=options, fullgraph=True)
    assert_no_less_accurate(run, linear, tensors())
