"""options={"verify": …} and bla_inductor.verify: wrong results are noticed, right ones are not
disturbed, and nobody can tell afterwards that anything was run twice.
"""

from __future__ import annotations

import logging
import pathlib
import runpy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bla_inductor
from bla_inductor import (
    BlaVerificationError,
    Comparison,
    examination,
    fp64,
    reproduction,
    trial,
    verifier,
)
from tests.compile.faults import GRADIENTS, RESULTS, operator_off_by, operator_raising

SHAPE = (2, 3, 24, 8)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(count: int = 3) -> list[Tensor]:
    return [torch.randn(SHAPE, requires_grad=True) for _ in range(count)]


def compiled(function: Callable[..., Any], verify: str = "first", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(
        function,
        backend="bla",
        options={"inner": "eager", "verify": verify, **options},
        fullgraph=True,
        dynamic=dynamic,
    )


class Block(nn.Module):
    """A residual block with everything that a second run could disturb."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        y = attention(*self.qkv(x).chunk(3, -1))
        y = F.dropout(y, self.p, self.training)
        return x + self.norm(y.flatten(0, 1)).view_as(x)


@pytest.fixture(autouse=True)
def _inner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_INNER", "eager")


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[bla_inductor.Verification]:
    """What each examination found, in order."""
    found: list[bla_inductor.Verification] = []

    def examine(*args: Any) -> bla_inductor.Verification:
        found.append(examination.examine(*args))
        return found[-1]

    monkeypatch.setattr(verifier, "examine", examine)
    return found


@pytest.fixture(autouse=True)
def scripts_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(reproduction.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("bla_inductor")]
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


# Wrong results


def test_a_wrong_result_is_noticed_and_never_reaches_the_user(caplog, scripts_in):
    args = tensors()
    run = compiled(attention)
    with operator_off_by(1.01, RESULTS):
        for _ in range(2):
            torch.testing.assert_close(run(*args), attention(*args), rtol=0, atol=0)
    (message,) = warnings_in(caplog)
    line = attention.__code__.co_firstlineno + 2
    assert f"{__file__}:{line}" in message
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


# Right results, in all kinds of graphs


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v).masked_fill(q < 0, float("-inf"))


def several(q: Tensor, k: Tensor, v: Tensor) -> Any:
    out = attention(q, k, v)
    return {"out": out, "none": None, "n": q.shape[-2], "best": out.argmax(-1), "of": (out.sum(),)}


def in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.float(), k.float(), v.float()).to(q.dtype)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def body(*args: Tensor) -> Tensor:
        return F.dropout(attention(*args), 0.5)

    return checkpoint(body, q, k, v, use_reentrant=False)


region = torch.compiler.nested_compile_region(attention)


def in_a_region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return region(q, k, v)


def on_a_condition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, attention, lambda q, k, v: v * 2.0, (q, k, v))


def with_random_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    noise = torch.randn_like(q) + torch.rand(q.shape[-1])
    return F.dropout(attention(q + noise, k, v), 0.3) * torch.bernoulli(torch.full_like(v, 0.5))


def detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k.detach(), v)


def island(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q = F.linear(q, v[0, 0, :8])
    return attention(q.float(), k, v)


GRAPHS = [
    (masked, 4),
    (several, 6),
    (checkpointed, 4),
    (in_a_region, 4),
    (on_a_condition, 4),
    (with_random_numbers, 4),
    (detached, 4),
    (island, 4),
]


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


# Nothing else is to be seen


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


# The function


def test_verify_reports_and_leaves_no_trace():
    model, x = Block(p=0.3), torch.randn(2, 24, 8, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = bla_inductor.verify(model, x)
    assert found.ok
    assert len(found.report.matches) == 1
    names = [c.name for c in found.comparisons]
    assert "output 0" in names
    assert any(name.startswith("gradient of ") and name.endswith("qkv.weight") for name in names)
    assert any(name.endswith("norm.running_var afterwards") for name in names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert "results as accurate as the original's (1 rewritten)" in str(found)
    assert found.check() is found


def test_verify_tells_what_is_wrong_and_raises_only_if_asked():
    with operator_off_by(1.01, GRADIENTS):
        found = bla_inductor.verify(attention, *tensors())
    assert [c.name for c in found.breaches] == ["gradient of args[0]"]
    assert "BREACH  1.0e-02" in str(found)
    with pytest.raises(BlaVerificationError, match="1 of 4 results less accurate"):
        found.check()


def test_verify_sees_every_graph_and_keeps_arguments(monkeypatch):
    """A graph break; the second graph reads what the first has written to the argument."""

    def model(x: Tensor, *, k: Tensor, v: Tensor) -> Tensor:
        x.mul_(2)
        out = attention(x, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, x)

    q, k, v = tensors()
    q = q + 0
    kept, made_by, version = q.detach().clone(), q.grad_fn, q._version
    found = bla_inductor.verify(torch.compile(model), q, k=k, v=v)
    assert found.calls == 2
    assert found.ok
    assert {"output 0", "output 0 (2)"} <= {c.name for c in found.comparisons}
    assert torch.equal(q, kept)
    assert (q.grad_fn, q._version) == (made_by, version)


def test_verify_has_nothing_to_say_of_a_model_without_attention():
    found = bla_inductor.verify(nn.Linear(3, 3), torch.randn(2, 3))
    assert found.ok
    assert not found.comparisons
    assert "nothing was compared (0 rewritten)" in str(found)


# The script


def exit_code(script: pathlib.Path) -> int:
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return int(caught.value.code)


def test_the_script_shows_the_breach_and_later_that_it_is_gone(capsys):
    with operator_off_by(1.01, RESULTS):
        found = bla_inductor.verify(Block(p=0.3), torch.randn(2, 24, 8))
        assert exit_code(found.script) == 1
    assert "BREACH  1.0e-02" in capsys.readouterr().out
    assert exit_code(found.script) == 0
    assert "as accurate as the original's (1 rewritten)" in capsys.readouterr().out
    text = found.script.read_text()
    assert "code: q, k = F.elu(q) + 1, F.elu(k) + 1" in text  # the user's lines
    told = text.partition("class Graph")[0].replace(str(found.script.parent), "")
    checkout = str(pathlib.Path(__file__).parents[2])
    assert "tmp" not in told.replace(checkout, "")


_OLD = pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo cannot trace _enter_autocast")
SCRIPTS = [pytest.param(island, marks=_OLD), checkpointed, in_a_region, on_a_condition]


@pytest.mark.parametrize("function", SCRIPTS)
def test_scripts_of_other_graphs(function, monkeypatch):
    monkeypatch.setenv("BLA_REWRITE", "always")
    with operator_off_by(1.05, RESULTS):
        found = bla_inductor.verify(function, *[x.abs().detach() for x in tensors()])
        assert exit_code(found.script) == 1


def test_a_script_runs_as_the_call_did(monkeypatch):
    monkeypatch.setenv("BLA_REWRITE", "always")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), operator_off_by(1.1, RESULTS):
        found = bla_inductor.verify(attention, *tensors())
    text = found.script.read_text().replace("'", '"')
    assert 'os.environ["BLA_REWRITE"] = "always"' in text
    assert 'with torch.set_grad_enabled(False), torch.autocast("cpu", torch.bfloat16):' in text


def test_large_inputs_are_drawn_again(monkeypatch):
    monkeypatch.setattr(reproduction, "MOST_BYTES", 0)
    expanded = torch.randn(2, 1, 24, 8).expand(SHAPE)
    with operator_off_by(1.01, RESULTS):
        found = bla_inductor.verify(attention, *tensors(2), expanded)
        assert exit_code(found.script) == 1
    assert (found.script.parent / "inputs.pt").stat().st_size < 4096


def test_no_script_no_harm(monkeypatch, caplog):
    monkeypatch.setattr(reproduction.tempfile, "tempdir", "/nonexistent")
    args = tensors()
    with operator_off_by(1.01, RESULTS):
        torch.testing.assert_close(compiled(attention)(*args), attention(*args))
    assert "none could be written" in warnings_in(caplog)[0]
