"""Which graphs with head dims above 128 are rewritten for CUDA, imagined by fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._subclasses import FakeTensorMode

from bla_inductor import compat, problem
from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite

pytest.importorskip("triton")
from bla_inductor.kernels import heuristics


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = phi(q), phi(k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products' operands in 16 bits, their results in 32."""
    q, k = phi(q), phi(k)
    return q.float() @ (k.float().mT @ v.float())


def in_float32_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return in_float32(q, k, v).to(torch.bfloat16)


def by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-1).mT @ v)


def of_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return phi(q) @ (phi(k).mT @ v) / (q.exp() @ k.exp().sum(-2).unsqueeze(-1) + 1e-6)


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "capability", lambda device: 9)


def told(
    function: Callable[..., Any],
    d: int = 160,
    dv: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    n: int = 4096,
    grad: bool = False,
) -> Report:
    shapes = [(2, 8, n, d), (2, 8, n, d), (2, 8, n, dv or d)]
    traced = fx.symbolic_trace(function)
    with FakeTensorMode() as mode:
        args = [torch.empty(s, dtype=dtype, device="cuda") for s in shapes]
    # Autograd would ask for the device.
    with (
        patch.object(problem, "is_differentiated", lambda root: grad),
        tracing(TracingContext(mode)),
    ):
        return rewrite(traced, args, Options())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"grad": True},
        {"d": 256, "grad": True},
        {"dtype": torch.float16},
        {"d": 128, "n": 256, "grad": True},
    ],
    ids=str,
)
def test_rewritten(given: dict[str, Any]) -> None:
    report = told(attention, **given)
    assert len(report.matches) == 1, report.refusals


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (attention, {"d": 168}),
        (attention, {"dv": 128}),
        (attention, {"n": 256}),
        (attention, {"dtype": torch.float32}),
        (attention, {"dtype": torch.float16, "grad": True}),
        (attention, {"dtype": torch.float16, "d": 256}),
        (by_rows, {}),
        (in_float32, {}),
        (in_float32_and_back, {}),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_left_to_inductor(function: Callable[..., Any], given: dict[str, Any]) -> None:
    report = told(function, **given)
    assert not report.matches
    assert any("faster than Inductor's GEMMs only in bfloat16" in r.reason for r in report.refusals)


def test_what_cannot_have_descriptors_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    with config.patch(cpp_wrapper=True):
        assert not told(attention).matches
    assert told(attention).matches
    monkeypatch.setattr(compat, "gives_kernels_memory", lambda: False)
    assert not told(attention).matches


def test_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "capability", lambda device: 8)
    assert not told(attention).matches


def test_a_normaliser_of_other_features_stays_outside() -> None:
    (match,) = told(of_others).matches
    assert "/" not in match.formula.partition("with")[0]
