"""The backend around the rewrite: options, messages, safety, caches."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

from bla_inductor import BlaError, BlaNoMatchError, backend, compat, stamp
from bla_inductor.options import Options

PROGRAM = """
    import os
    import torch
    from torch._dynamo.utils import counters

    def attention(q, k, v):
        q, k = q.relu(), k.relu()
        return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)

    q, k, v = torch.rand(3, 1, 2, 256, 16)
    options = {"inner": os.environ.get("INNER", "eager")}
    out = torch.compile(attention, backend="bla", options=options)(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v))
"""


def attention(q, k, v):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def inputs():
    return torch.rand(3, 1, 2, 256, 16).unbind()


def plain(x):
    return x.sin() + 1


def compiled(function, **options):
    return torch.compile(function, backend="bla", options={"inner": "eager", **options})


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_every_inner_compiler_gives_the_result_and_the_gradients(inner, request):
    if inner == "inductor":
        request.applymarker(pytest.mark.slow)
    ours = [x.clone().requires_grad_() for x in inputs()]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out, expected = compiled(attention, inner=inner)(*ours), attention(*theirs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), ours),
        torch.autograd.grad(expected.square().sum(), theirs),
    )
    assert counters["bla"]["matched"] == 1


def test_counters_add_up_over_graphs():
    def two_graphs(q, k, v):
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return out.sin()

    compiled(two_graphs)(*inputs())
    assert counters["bla"]["graphs"] == 2
    assert counters["bla"]["matched"] == 1


def test_off_only_reports():
    compiled(attention, rewrite="off")(*inputs())
    assert counters["bla"]["matched"] == 0
    assert counters["bla"]["refused"] == 1


def test_strict_raises_when_nothing_matched():
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(plain, strict=True)(torch.ones(3))
    error = caught.value.inner_exception
    assert isinstance(error, BlaNoMatchError)
    assert error.report.matches == []
    assert "strict=True, and nothing in this graph was rewritten" in str(error).splitlines()[0]
    assert "fullgraph=True" in str(error)


def test_strict_is_silent_when_something_matched():
    compiled(attention, strict=True)(*inputs())
    assert counters["bla"]["matched"] == 1


def test_an_unknown_option_fails_before_any_work(monkeypatch):
    monkeypatch.setattr(backend, "rewrite", lambda *_: pytest.fail("should not get here"))
    with pytest.raises(BackendCompilerFailed, match="did you mean 'strict'"):
        compiled(plain, strct=True)(torch.ones(3))
    with pytest.raises(BackendCompilerFailed, match="max_autotune, got int should be bool"):
        compiled(plain, max_autotune=3)(torch.ones(3))


def test_arguments_of_a_future_torch_are_named():
    gm = torch.fx.symbolic_trace(plain)
    with pytest.raises(BlaError, match="does not know: colour"):
        backend.bla(gm, [torch.ones(3)], colour="red")


@pytest.mark.parametrize("how", [{"mode": "max-autotune"}, {"options": {"mode": "max-autotune"}}])
def test_mode_and_its_option_reach_inductor(how, monkeypatch):
    seen = {}

    def compile_fx(gm, example_inputs, inner_compile, config_patches, **_):
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(plain, backend="bla", **how)(torch.ones(3))
    assert seen["max_autotune"] is True
    assert isinstance(seen[stamp.SLOT], stamp.CacheStamp)
    assert seen[stamp.SLOT].options == Options(mode="max-autotune")


def broken(*_):
    raise ZeroDivisionError("a fault of ours")


def test_a_failure_of_ours_leaves_the_graph_as_it_was(monkeypatch, caplog):
    monkeypatch.setattr(backend, "rewrite", broken)
    x = torch.rand(5)
    torch.testing.assert_close(compiled(plain)(x), plain(x))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.name == "bla_inductor.backend"
    assert "ZeroDivisionError: a fault of ours" in record.message
    assert "report" in record.message


def test_a_failure_of_ours_is_raised_when_strict(monkeypatch):
    monkeypatch.setattr(backend, "rewrite", broken)
    with pytest.raises(BackendCompilerFailed, match="a fault of ours"):
        compiled(plain, strict=True)(torch.rand(5))


def test_reset_drops_cuda_graphs(monkeypatch):
    calls = []
    fake = types.SimpleNamespace(reset_cudagraph_trees=lambda: calls.append(1))
    compiled(plain)(torch.ones(3))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch._inductor.cudagraph_trees", fake)
        torch._dynamo.reset()
    assert calls


def test_silent_by_default(run_python):
    done = run_python(PROGRAM)
    assert done.stdout + done.stderr == ""


def test_one_line_with_torch_logs(run_python, tmp_path):
    done = run_python(PROGRAM, TORCH_LOGS="bla_inductor", TORCH_TRACE=str(tmp_path / "trace"))
    (line,) = done.stderr.splitlines()
    assert "[0/0] 1 matched, 0 refused" in line
    trace = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert '"name": "bla_report"' in trace
    assert "\tmatched " in trace


def test_the_whole_report_with_plus(run_python):
    """TORCH_LOGS naming the package makes torch import its packages while it starts itself."""
    done = run_python(PROGRAM, TORCH_LOGS="+bla_inductor", INNER="aot_eager")
    assert "program.py:7  linear attention" in done.stderr
    assert "return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)" in done.stderr


class Named(CustomGraphPass):
    def __init__(self, name, calls=None):
        self.name, self.calls = name, calls

    def __call__(self, graph):
        self.calls.append(self.name)

    def uuid(self):
        return self.name if self.calls is None else None  # None: run every time, cache nothing


def test_the_stamp_depends_on_sources_options_and_the_users_passes(monkeypatch):
    def uuid(options=None, users=None):
        return stamp.CacheStamp(options or Options(), users).uuid()

    assert uuid() == uuid()
    assert uuid() != uuid(Options(rewrite="always"))
    assert uuid() != uuid(users=Named("a")) != uuid(users=Named("b"))
    assert uuid(users=Named("a")) == uuid(users=[Named("a")])
    assert uuid(users=[Named("a"), lambda graph: None]) is None
    before = uuid()
    monkeypatch.setattr(stamp, "source_hash", lambda: "other")
    assert uuid() != before


def test_the_hash_covers_every_package(tmp_path, monkeypatch):
    def hashed(package):
        for name in (package, "bla_inductor"):
            root = tmp_path / name.replace(".", "/")
            root.mkdir(parents=True, exist_ok=True)
            (root / "__init__.py").touch()
        spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / package)])
        empty = types.SimpleNamespace(submodule_search_locations=[])
        monkeypatch.setattr(
            stamp.importlib.util, "find_spec", lambda name: spec if name == package else empty
        )
        return stamp.source_hash.__wrapped__()

    for package in ("bla_inductor", "bla_inductor.patterns", "bla_inductor.kernels"):
        (tmp_path / package).mkdir(exist_ok=True)
        source = tmp_path / package / "x.py"
        source.write_text("a = 1")
        before = hashed(package)
        assert hashed(package) == before
        source.write_text("a = 2")
        assert hashed(package) != before


@pytest.mark.slow
def test_passes_of_the_users_still_run():
    calls: list[str] = []
    first, second = Named("options", calls), Named("config", calls)
    x = torch.rand(4)
    compiled(plain, inner="inductor", post_grad_custom_pre_pass=first)(x)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"post_grad_custom_pre_pass": second}):
        compiled(plain, inner="inductor")(x)
    assert calls == ["options", "config"]


def test_a_pass_that_asks_whether_it_is_inference_is_told():
    base = compat.inference_aware_pass()
    if base is None:
        pytest.skip("this torch has no such passes")
    seen = []

    class Aware(base):
        def __call__(self, graph, is_inference):
            seen.append(is_inference)

        def uuid(self):
            return "aware"

    installed = stamp.CacheStamp(Options(), [Aware(), Named("plain", seen)])
    assert isinstance(installed, base)
    installed(torch.fx.Graph(), is_inference=True)
    assert seen == [True, "plain"]


def test_the_compiled_module_keeps_its_parameters_training():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    run = compiled(model, inner="aot_eager")
    run(torch.rand(4, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
