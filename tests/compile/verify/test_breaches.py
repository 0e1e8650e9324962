"""`verify`: wrong results are noticed, and nothing else is to be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bla_inductor import (
    BlaVerificationError,
    Comparison,
    examination,
    verifier,
)
from tests.compile.faults import GRADIENTS, RESULTS, operator_off_by, operator_raising
from tests.compile.verify.models import (
    SHAPE,
    Block,
    attention,
    checkpointed,
    compiled,
    tensors,
    warnings_in,
    with_random_numbers,
)


def test_a_wrong_result_is_noticed_and_never_reaches_the_user(caplog, scripts_in):
    args = tensors()
    run = compiled(attention)
    with operator_off_by(1.01, RESULTS):
        for _ in range(2):
            torch.testing.assert_close(run(*args), attention(*args), rtol=0, atol=0)
    (message,) = warnings_in(caplog)
    line = attention.__code__.co_firstlineno + 2
    assert f"{attention.__code__.co_filename}:{line}" in message
    assert "output 0 is 1.0e-02 from fp64, the original" in message
    assert "operator by operator the rewritten graph is as wrong" in message
    assert str(next(scripts_in.rglob("reproduce.py"))) in message


def test_a_wrong_gradient_is_noticed(caplog):
    args = tensors()
    run = compiled(attention)
    expected = torch.autograd.grad(attention(*args).sum(), args)
    with operator_off_by(1.01, GRADIENTS):
        got = torch.autograd.grad(run(*args).sum(), args)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    (message,) = warnings_in(caplog)
    assert "gradient of q is 1.0e-02 from fp64" in message
    assert "output" not in message


def test_strict_raises(caplog):
    run = compiled(attention, strict=True)
    with operator_off_by(1.01, RESULTS), pytest.raises(BlaVerificationError) as caught:
        run(*tensors())
    found = caught.value.verification
    assert found.breaches[0].name == "output 0"
    assert f"python {found.script}" in str(caught.value)
    assert len(found.comparisons) == 4
    assert not warnings_in(caplog)


def test_what_raises_is_a_breach(caplog):
    args = tensors()
    run = compiled(attention, "always")
    run(*args)
    with operator_raising():
        torch.testing.assert_close(run(*args), attention(*args), rtol=0, atol=0)
    assert "raises RuntimeError: no such kernel" in warnings_in(caplog)[0]


def test_first_and_always(examined):
    args = tensors()
    first, always = compiled(attention), compiled(attention, "always")
    for run in (first, always):
        run(*args)
        run(*args)
    assert len(examined) == 3
    with operator_off_by(1.01, RESULTS):
        assert not torch.equal(first(*args), attention(*args))
        assert torch.equal(always(*args), attention(*args))


def test_what_may_be_chance_is_measured_on_eight_inputs(monkeypatch, examined):
    lucky = Comparison("output 0", 0.9e-5, 1e-5, 1.1e-5, entries=10_000, eps=1e-7)
    rows = iter([replace(lucky, ours=1.3e-5), *[lucky] * 7])
    monkeypatch.setattr(examination._Draw, "beside", lambda *_: [next(rows)])
    compiled(attention)(*tensors())
    (found,) = examined
    assert found.ok
    assert found.comparisons[0].note == "over 8 inputs"
    assert not list(rows)


def test_an_inner_compiler_that_is_wrong_is_told_from_the_operator(monkeypatch, caplog):
    """Its graph computes something else, the rewritten graph by itself does not."""
    from bla_inductor import backend

    def wrong(*_: Any) -> Any:
        return lambda gm, inputs: lambda *args: [x * 1.01 for x in gm.forward(*args)]

    monkeypatch.setattr(backend, "inner_compiler", wrong)
    compiled(attention)(*tensors())
    assert "is right" in warnings_in(caplog)[0]
    assert "so it is the code that eager made of it" in warnings_in(caplog)[0]


@pytest.mark.parametrize("of_all", [True, False])
def test_what_the_inner_compiler_rounds_is_not_held_against_the_rewrite(
    monkeypatch, caplog, examined, of_all
):
    """Its code is off by a few roundings too many, of the graph as written (of_all) as well."""
    from bla_inductor import backend

    def inexact(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        rewritten = torch.ops.bla.linear_attention.default in {n.target for n in gm.graph.nodes}
        off = 1 + 3e-6 if rewritten or of_all else 1
        return lambda *args: [x * off for x in gm.forward(*args)]

    monkeypatch.setattr(backend, "inner_compiler", lambda *_: inexact)
    compiled(attention)(*tensors())
    (found,) = examined
    assert found.ok == of_all
    assert found.comparisons[0].ours == pytest.approx(3e-6, rel=0.2)
    assert ("eager alone, without bla, is" in str(found)) == of_all
    assert bool(warnings_in(caplog)) != of_all


def test_dropout_and_batch_norm_happen_once(examined):
    """To the last bit what happens without verification."""
    models = [Block(p=0.3), Block(p=0.3)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 24, 8)
    for model, verify in zip(models, ("always", None), strict=True):
        run = compiled(model, verify)
        torch.manual_seed(5)
        for _ in range(3):
            run(x).sin().sum().backward()
    assert len(examined) == 3
    assert all(found.ok and not found.notes for found in examined), examined[0]
    assert any(row.name.endswith("running_var afterwards") for row in examined[0].comparisons)
    assert any(row.name.endswith("qkv.weight") for row in examined[0].comparisons)
    ours, theirs = (
        {**model.state_dict(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
        for model in models
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("differentiable", [False, True])
def test_what_is_written_in_place_is_written_once(differentiable, examined):
    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x.add_(1)
        return attention(x, k, v)

    start = torch.randn(SHAPE, requires_grad=differentiable)
    _, k, v = tensors()
    ours, theirs = start + 0, start + 0
    run = compiled(model)
    torch.testing.assert_close(run(ours, k, v), model(theirs, k, v))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (found,) = examined
    assert found.ok
    assert "x afterwards" in [c.name for c in found.comparisons]


def test_a_wrong_value_written_in_place_is_noticed(caplog):
    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> None:
        kept.copy_(attention(q, k, v))

    args = [x.detach() for x in tensors(4)]
    with operator_off_by(1.01, RESULTS):
        compiled(model, rewrite="always")(*args)
    torch.testing.assert_close(args[3], attention(*args[:3]))
    assert "kept afterwards is 1.0e-02 from fp64" in warnings_in(caplog)[0]


def test_a_checkpoint_around_the_compiled_call_counts_what_it_saves():
    run, args = compiled(attention, "always"), tensors()
    out = checkpoint(run, *args, use_reentrant=False)
    ours = torch.autograd.grad(out.sum(), args)
    torch.testing.assert_close(ours, torch.autograd.grad(attention(*args).sum(), args))


def test_hooks_and_gradients_of_parameters_are_not_touched():
    model, seen = Block(), []
    for parameter in model.parameters():
        parameter.register_hook(seen.append)
    compiled(model)(torch.randn(2, 24, 8))
    assert not seen
    assert all(p.grad is None for p in model.parameters())


def test_a_call_under_a_dispatch_mode_waits():
    """Whoever counts operators would count them three times."""
    args = tensors()
    assert verifier._can_run_twice(args)
    with FlopCounterMode(display=False):
        assert not verifier._can_run_twice(args)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in args]
    assert not verifier._can_run_twice(fake)


def test_without_a_match_nothing_is_verified(examined):
    compiled(lambda x: x.sin())(torch.randn(3))
    assert not examined


def test_approximations_are_not_verified(examined, caplog):
    q = torch.randn(1, 2, 512, 16)
    pisa = {"pisa": {"density": 0.2, "block_size": 16}}
    run = compiled(F.scaled_dot_product_attention, approximate=pisa, rewrite="always")
    run(q, q, q)
    assert not examined
    assert any("is not verified: its results differ" in m for m in warnings_in(caplog))


def test_what_cannot_be_verified_is_used_as_it_is(monkeypatch, caplog):
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(verifier, "examine", no_memory)
    args = tensors()
    torch.testing.assert_close(compiled(attention, "always")(*args), attention(*args))
    (message,) = warnings_in(caplog)
    assert "could not be verified, and is used as it is: OutOfMemoryError: no memory" in message
    with pytest.raises(BlaVerificationError, match="OutOfMemoryError: no memory"):
        compiled(attention, strict=True)(*args)


def test_the_original_of_a_checkpoint_draws_its_dropout_twice(caplog):
    """What is fallen back to: run as it is, Dynamo's graph would draw another one for backward."""
    args = tensors()
    run = compiled(checkpointed)
    got = []
    with operator_off_by(1.01, RESULTS):
        for function in (run, run, checkpointed):
            torch.manual_seed(3)
            got.append(torch.autograd.grad(function(*args).sum(), args))
    assert len(warnings_in(caplog)) == 1
    torch.testing.assert_close(got[0], got[2], rtol=0, atol=0)
    torch.testing.assert_close(got[1], got[2], rtol=0, atol=0)


@pytest.mark.slow
def test_inductor_draws_what_eager_draws(examined, caplog):
    """Its own generator would give another dropout, and so another result."""
    run, args = compiled(with_random_numbers, inner="inductor"), tensors()
    torch.manual_seed(1)
    got = run(*args)
    torch.manual_seed(1)
    torch.testing.assert_close(got, with_random_numbers(*args))
    assert examined[0].ok, examined[0]
    assert not warnings_in(caplog)
