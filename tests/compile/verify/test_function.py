"""`bla_inductor.verify`, and the script that shows a breach again."""

from __future__ import annotations

import pathlib
import runpy

import pytest
import torch
from torch import Tensor, nn

import bla_inductor
from bla_inductor import (
    BlaVerificationError,
    reproduction,
)
from tests.compile.faults import GRADIENTS, RESULTS, operator_off_by
from tests.compile.verify.models import (
    SHAPE,
    Block,
    attention,
    checkpointed,
    compiled,
    in_a_region,
    island,
    on_a_condition,
    tensors,
    warnings_in,
)


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
    checkout = str(pathlib.Path(__file__).parents[3])
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
    monkeypatch.setattr(reproduction.tempfile, "tempdir", f"{__file__}/a file is no folder")
    args = tensors()
    with operator_off_by(1.01, RESULTS):
        torch.testing.assert_close(compiled(attention)(*args), attention(*args))
    assert "none could be written" in warnings_in(caplog)[0]
