"""`verify`: right results, in all kinds of graphs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bla_inductor import (
    fp64,
    trial,
)
from tests.compile.faults import RESULTS, operator_off_by
from tests.compile.verify.models import (
    GRAPHS,
    attention,
    compiled,
    in_fp32,
    tensors,
    warnings_in,
)


@pytest.mark.parametrize(("function", "count"), GRAPHS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_result_is_compared_with_fp64(function, count, examined, caplog):
    args = tensors()
    state = torch.get_rng_state()
    expected = function(*args)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    got = compiled(function, "always", rewrite="always", inner="aot_eager")(*args)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(got, expected)
    (found,) = examined
    assert found.ok
    assert not found.notes
    assert len(found.comparisons) == count
    assert all(row.original < 0.05 for row in found.comparisons)  # the same random numbers
    assert not warnings_in(caplog)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_and_upcasts(dtype, examined):
    """The fp32 that the user asks for is fp64 in the exact run: else it would be no more exact."""
    args = [x.detach().to(dtype).requires_grad_() for x in tensors()]
    compiled(in_fp32, rewrite="always")(*args)
    (found,) = examined
    assert found.ok, found
    assert 1e-5 < found.comparisons[0].original < 1e-2
    with operator_off_by(1.05, RESULTS):
        compiled(in_fp32, rewrite="always")(*args)


def test_without_gradients(examined):
    args = tensors()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            compiled(attention)(*[x.detach() for x in args])
            compiled(attention)(*args)
    compiled(attention)(*[x.detach() for x in args])
    compiled(attention)(args[0], *[x.detach() for x in args[1:]])
    assert [len(found.comparisons) for found in examined] == [1, 1, 1, 1, 1, 2]
    assert all(found.ok for found in examined)


def test_under_autocast(examined):
    """bf16 inside: judged by the original's own error, which is about 1 in 1000."""
    with torch.autocast("cpu", torch.bfloat16):
        compiled(attention, rewrite="always")(*tensors())
    (found,) = examined
    assert found.ok
    assert not found.notes
    assert found.comparisons[0].original > 1e-4


def test_symbolic_sizes_and_integer_inputs(examined):
    def model(q: Tensor, k: Tensor, v: Tensor, scale: int, index: Tensor) -> Any:
        out = attention(q, k, v)[..., index, :] * scale
        return out, q.shape[-2] + scale

    index = torch.tensor([1, 3, 5])
    run = compiled(model, "always", dynamic=True)
    for n in (24, 31):
        args = [torch.randn(2, 3, n, 8, requires_grad=True) for _ in range(3)]
        out, size = run(*args, 3, index)
        torch.testing.assert_close(out, model(*args, 3, index)[0])
        assert size == n + 3
    assert len(examined) == 2
    assert all(found.ok and not found.notes for found in examined)


def test_fp64_is_compared_with_the_original_alone(examined):
    compiled(attention)(*[x.detach().double() for x in tensors()])
    (found,) = examined
    assert found.ok
    assert "it is in fp64 as it is" in found.notes[0]
    assert found.comparisons[0].original is None


def test_a_graph_that_does_not_run_in_fp64(examined, caplog):
    """Its bits are read as integers: compared with the original, and still noticed if wrong."""
    caplog.set_level(logging.INFO, "bla_inductor.verifier")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        signs = (q.detach().view(torch.int32) >> 31).to(q.dtype)
        return attention(q, k, v) * (1 + 2 * signs)

    compiled(model)(*tensors())
    torch._dynamo.reset()
    with operator_off_by(1.01, RESULTS):
        compiled(model)(*tensors())
    right, wrong = examined
    assert "it reads memory as another dtype" in right.notes[0]
    assert "it reads memory as another dtype" in caplog.text
    assert right.ok
    assert "is 1.0e-02 from the original, allowed" in warnings_in(caplog)[0]
    assert not wrong.ok


def test_copies_have_the_strides_and_the_sharing_of_the_inputs():
    rows = torch.randn(4, 6)
    inputs = [rows[1:3], rows.T, torch.randn(3, 1).expand(3, 5), torch.randn(8, 8)[::2, 1::2], 7]
    for dtypes in ({}, {torch.float32: torch.float64}):
        made = trial.duplicates(inputs, dtypes)
        assert made[4] == 7
        for x, copy in zip(inputs[:4], made[:4], strict=True):
            assert copy.stride() == x.stride()
            assert copy.dtype == dtypes.get(x.dtype, x.dtype)
            torch.testing.assert_close(copy.float(), x, rtol=0, atol=0)
        made[0].fill_(3)
        assert made[1][0, 1] == 3
    assert not (rows == 3).any()


def test_a_graph_with_parameters_and_buffers_of_its_own():
    """They are no inputs, so that nothing can be a copy: put back, and in fp64 the twin's."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    graph = torch.fx.symbolic_trace(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(16, 8)
    for owner, dtypes in ((graph, {}), (fp64.twin(graph), fp64.WIDE)):
        found = trial.run(owner.forward, owner, trial.Copies.of([x], dtypes))
        assert len(found.gradients) == 4
        assert not torch.equal(found.owned[0].float(), before["1.running_mean"])
        assert found.outputs[0].dtype == next(owner.parameters()).dtype
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_inputs_that_share_memory_or_are_expanded(examined):
    rows = torch.randn(2, 3, 3, 24, 8)
    q, k, v = rows.unbind(1)
    wide = torch.randn(2, 1, 24, 8).expand(2, 3, 24, 8)
    compiled(attention)(q, k, v)
    compiled(attention)(q, wide, v)
    assert len(examined) == 2
    assert all(found.ok and not found.notes for found in examined)
