"""`with bla_inductor.debug(folder):` files that tell what was compiled, and at no other cost."""

from __future__ import annotations

import ast
import logging
import pathlib
import threading
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bla_inductor
from bla_inductor import debugger
from bla_inductor.algebra import observe

FILES = {"before.py", "after.py", "terms.txt", "report.txt"}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(grad: bool = True) -> list[Tensor]:
    return [torch.randn(2, 3, 24, 8, requires_grad=grad) for _ in range(3)]


def compiled(function: Any = attention, **options: Any) -> Any:
    return torch.compile(
        function, backend="bla", options={"inner": "aot_eager", **options}, fullgraph=True
    )


def names(folder: pathlib.Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("bla_inductor")]
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


def test_a_graph_before_and_after_its_terms_and_its_report(tmp_path, caplog):
    with bla_inductor.debug(tmp_path / "new" / "folder") as folder:
        compiled()(*tensors())
    assert names(folder) == {"graph_0"}
    made = folder / "graph_0"
    assert names(made) == FILES
    before, after, terms, report = (
        (made / name).read_text() for name in ("before.py", "after.py", "terms.txt", "report.txt")
    )
    for text in (before, after):
        ast.parse(text)
    assert "torch.nn.functional.elu" in before
    assert "code: q, k = F.elu(q) + 1, F.elu(k) + 1" in before
    assert "torch.ops.bla.linear_attention" in after
    assert "torch.ops.bla.linear_attention" not in before
    (product,) = [line for line in terms.splitlines() if "^-1" in line]
    assert product == (
        "    = Σ(e=24 f=8) q[a, b, c, f] · k[a, b, e, f] · l_v_[a, b, e, d]"
        " · (Σ(g=24 h=8) q[a, b, c, h] · k[a, b, g, h] + 1e-06)^-1"
    )
    assert f"matched  {__file__}" in report
    assert "inner='aot_eager'" in report
    assert not warnings_in(caplog)


@pytest.mark.slow
def test_inductors_code_on_a_warm_cache_too(tmp_path):
    """The second compilation would be served from the caches of Inductor and AOTAutograd."""
    args = tensors()
    compiled(inner="inductor")(*args).sum().backward()
    torch._dynamo.reset()
    with bla_inductor.debug(tmp_path):
        compiled(inner="inductor")(*args).sum().backward()
    made = tmp_path / "graph_0"
    assert names(made) == FILES | {"forward.py", "backward.py"}
    for name in ("forward.py", "backward.py"):
        text = (made / name).read_text()
        ast.parse(text)
        assert "def call(" in text


def test_the_code_of_each_graph_has_a_name(tmp_path):
    compile_one = debugger.Recorder(tmp_path).writing(
        lambda gm, inputs, **_: types.SimpleNamespace(source_code="pass")
    )
    for kind in ({}, {"is_backward": True}, {"is_inference": True}, {}):
        compile_one(None, [], **kind)
    assert names(tmp_path) == {"forward.py", "forward_1.py", "backward.py", "inference.py"}


def test_bodies_have_terms_and_a_refusal_is_reported(tmp_path):
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = checkpoint(attention, q, k, v, use_reentrant=False)
        return (out @ out.mT).softmax(-1) @ v

    with bla_inductor.debug(tmp_path):
        compiled(model)(*tensors())
    terms = (tmp_path / "graph_0" / "terms.txt").read_text()
    assert "^-1" in terms.partition("the graph body 0")[2]
    assert "^-1" not in terms.partition("the graph body 0")[0]


def test_graphs_are_numbered_on(tmp_path):
    """Two graphs, two blocks, one folder."""

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, v)

    for _ in range(2):
        torch._dynamo.reset()
        with bla_inductor.debug(tmp_path):
            torch.compile(broken, backend="bla", options={"inner": "eager"})(*tensors())
    assert names(tmp_path) == {f"graph_{n}" for n in range(4)}


def test_blocks_inside_blocks_and_after_blocks(tmp_path):
    with bla_inductor.debug(tmp_path / "outer"):
        with bla_inductor.debug(tmp_path / "inner"):
            compiled()(*tensors())
        torch._dynamo.reset()
        compiled()(*tensors())
    torch._dynamo.reset()
    compiled()(*tensors())
    assert names(tmp_path / "outer") == names(tmp_path / "inner") == {"graph_0"}


def test_other_threads_are_written_down(tmp_path):
    with bla_inductor.debug(tmp_path):
        thread = threading.Thread(target=lambda: compiled()(*tensors()))
        thread.start()
        thread.join()
    assert names(tmp_path / "graph_0") == FILES


def test_nothing_compiled_is_a_warning(tmp_path, caplog):
    run, args = compiled(), tensors()
    run(*args)
    with bla_inductor.debug(tmp_path):
        run(*args)
    assert "nothing was compiled" in warnings_in(caplog)[0]
    assert "torch.compiler.reset()" in warnings_in(caplog)[0]


def test_what_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_text(*_: Any) -> Any:
        raise ValueError("no text")

    monkeypatch.setattr(debugger, "_readable", no_text)
    args = tensors()
    with bla_inductor.debug(tmp_path):
        torch.testing.assert_close(compiled()(*args), attention(*args))
    assert names(tmp_path / "graph_0") == {"terms.txt", "report.txt"}
    told = warnings_in(caplog)
    assert "before.py was not written: ValueError: no text" in told[0]
    assert "after.py was not written: ValueError: no text" in told[1]


def test_a_folder_that_goes_away_is_a_warning(tmp_path, caplog):
    args = tensors()
    with bla_inductor.debug(tmp_path / "gone") as folder:
        folder.rmdir()
        torch.testing.assert_close(compiled()(*args), attention(*args))
    assert "no folder for a graph" in warnings_in(caplog)[0]


def test_a_graph_that_cannot_be_observed_says_so(tmp_path, monkeypatch):
    def fails(*_: Any) -> Any:
        raise ValueError("cannot be seen")

    monkeypatch.setattr("bla_inductor.algebra.observe", fails)
    with bla_inductor.debug(tmp_path):
        compiled()(*tensors())
    assert "ValueError: cannot be seen" in (tmp_path / "graph_0" / "terms.txt").read_text()
    assert observe is not fails


def test_a_reproduction_lies_beside_the_graphs(tmp_path):
    from tests.compile.faults import RESULTS, operator_off_by

    with bla_inductor.debug(tmp_path), operator_off_by(1.01, RESULTS):
        compiled(verify="first")(*tensors(grad=False))
    assert len(list(tmp_path.glob("bla-reproduction-*/reproduce.py"))) == 1
