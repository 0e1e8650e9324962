"""Kernels that Triton does not compile for a GPU: ATen computes instead, and says so once."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bla_inductor import failures
from bla_inductor.ops import dispatch

triton_errors = pytest.importorskip("triton.runtime.errors")
FORMULA = {"normalizer": "add", "eps": 1e-6}


@pytest.fixture
def calls(monkeypatch):
    """What the kernels were asked for; every one of them fails as `error` says."""
    seen: list[str] = []
    state = SimpleNamespace(
        seen=seen, error=triton_errors.OutOfResources(278528, 101376, "shared memory")
    )

    def fails(name: str) -> Any:
        def run(*args: Any) -> None:
            seen.append(name)
            raise state.error

        return run

    kernels = SimpleNamespace(forward=fails("forward"), backward=fails("backward"))
    monkeypatch.setattr(dispatch, "_kernels", lambda *_: kernels)
    monkeypatch.setattr(dispatch, "_uncompiled", set())
    failures.forget()
    return state


def tensors() -> list[torch.Tensor]:
    return [torch.rand(2, 3, 10, 8) for _ in range(3)]


def test_aten_takes_over_and_warns_once(calls, caplog) -> None:
    args = tensors()
    expected = dispatch._forward_aten(*args, **FORMULA)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours = dispatch._forward_cuda(*args, **FORMULA)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert calls.seen == ["forward"]  # and not again
    (record,) = caplog.records
    assert "out of resource: shared memory" in record.getMessage()
    assert "ATen computes this attention" in record.getMessage()

    _, state, key_sum = expected
    q, k, v = args
    given = (torch.ones_like(v), q, k, v, None, None, None, state, key_sum)
    needs = [True] * 3 + [False] * 3
    grads = dispatch._backward_cuda(*given, **FORMULA, needs=needs)
    plain = dispatch._backward_aten(*given, **FORMULA, needs=needs)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert calls.seen == ["forward", "backward"]


def test_other_head_dims_are_tried(calls) -> None:
    dispatch._forward_cuda(*tensors(), **FORMULA)
    dispatch._forward_cuda(*(torch.rand(2, 3, 10, 16) for _ in range(3)), **FORMULA)
    assert calls.seen == ["forward", "forward"]


def test_what_is_no_failure_to_compile_is_raised(calls) -> None:
    calls.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        dispatch._forward_cuda(*tensors(), **FORMULA)
