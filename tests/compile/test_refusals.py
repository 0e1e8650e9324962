"""Every reason for leaving something as it is, provoked: by a program that a user could write
(`refused.py`), or where none leads there, in the function that says it.

A reason says what, where, why, and what to do.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap

import bla_inductor
from bla_inductor.algebra import Index, Observation, Opaque, observe
from bla_inductor.cost import Problem, decide
from bla_inductor.emit import Emitter, Unemittable
from tests.compile.refused import BHND, ND, PROGRAMS, Program


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda c: c.function.__name__)
def test_reason(case: Program) -> None:
    report = bla_inductor.explain(case.function, *case.inputs())
    assert len(report.matches) == case.matches
    found = [r for r in report.refusals if case.reason in r.reason]
    assert len(found) == 1, [r.reason for r in report.refusals]
    place, code = found[0].location, case.function.__code__
    assert place.file == code.co_filename
    assert code.co_firstlineno <= place.line <= max(at for *_, at in code.co_lines() if at)


def test_one_refusal_a_place() -> None:
    """The reshapes that follow a refused product are not places of their own."""

    def model(q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        out = out.transpose(1, 2)
        return out.flatten(2)

    report = bla_inductor.explain(model, *[torch.randn(BHND) for _ in range(3)])
    assert len(report.refusals) == 1


def test_of_two_divisors_one_is_inside_and_the_other_no_news() -> None:
    def model(q, k, v):
        z = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
        return q @ (k.mT @ v) / z / (z + 1)

    report = bla_inductor.explain(model, *[torch.rand(BHND) for _ in range(3)])
    assert "÷" in report.matches[0].formula
    assert report.refusals == []


ONLY_REPORTED = "asks for a report alone"


def test_only_a_report_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_REWRITE", "off")
    x = torch.randn(ND)
    (refusal,) = bla_inductor.explain(lambda q, k, v: q @ (k.T @ v), x, x, x).refusals
    assert ONLY_REPORTED in refusal.reason


# Reasons that need a GPU

CUDA: dict[str, Any] = {"batch": 8, "n": 1024, "m": 1024, "quadratic": False, "normalised": True}
ON_CUDA = [
    ("the kernels take at most", {"c": 512, "d": 64, "itemsize": 2}),
    ("faster than Inductor's GEMMs only in bfloat16", {"c": 160, "d": 160, "itemsize": 2}),
    ("would copy q, k and v into padded rows", {"c": 36, "d": 36, "itemsize": 2}),
    (
        "float32 at matmul precision 'highest'",
        {"c": 128, "d": 128, "itemsize": 4, "gradients": True, "float32": "highest"},
    ),
    (
        "have their channels apart in memory",
        {"c": 32, "d": 32, "gradients": True, "copied": 5},
    ),
    ("fewer FLOPs than q(kᵀv)", {"n": 16, "m": 16, "c": 64, "d": 64, "quadratic": True}),
]


@pytest.mark.parametrize(
    ("reason", "sizes"), ON_CUDA, ids=lambda x: x if isinstance(x, str) else ""
)
def test_reason_on_cuda(reason: str, sizes: dict[str, Any]) -> None:
    decision = decide(Problem(**{"device": "cuda", "itemsize": 2, **CUDA, **sizes}))
    assert not decision.pays
    assert reason in decision.reason


# Reasons that no program is known to provoke: they stand where going on would be wrong


def emitter() -> tuple[Emitter, fx.Node]:
    """One that writes before the one operator of a graph, and the input of that graph."""
    gm = fx.symbolic_trace(lambda x: x.relu())
    seen: Observation = observe(gm, [torch.randn(4, 6)], [False])
    x, relu, _ = gm.graph.nodes
    return Emitter(gm, seen, relu), x


def a_size_that_no_tensor_has() -> None:
    emitter()[0].number(sympy.floor(sympy.Symbol("s0") / 2))


def an_index_that_the_operand_has_not() -> None:
    i, j, k = Index(4), Index(6), Index(4)
    emit, x = emitter()
    emit.laid_out(x, ((i,), (j,)), ((k,), (j,)), [False, False])


def a_diagonal_of_an_operand() -> None:
    i = Index(4)
    emit, x = emitter()
    emit.laid_out(x, ((i,), (i,)), ((i,),), [False])


def a_body_without_a_result() -> None:
    graph = fx.Graph()
    x, body = graph.placeholder("x"), graph.get_attr("body")
    graph.output(graph.call_function(wrap, (body, x)))
    inner = fx.symbolic_trace(lambda x: x.relu())
    observe(fx.GraphModule({"body": inner}, graph), [torch.randn(4)], [False])


def a_tensor_of_a_transform() -> None:
    relu = fx.symbolic_trace(lambda x: x.relu())
    torch.func.vmap(lambda x: observe(relu, [x], [False]))(torch.randn(4, 6))


def a_tensor_of_mkldnn() -> None:
    observe(fx.symbolic_trace(lambda x: x.to_dense()), [torch.randn(4).to_mkldnn()], [False])


def inputs_in_a_list() -> None:
    first = fx.symbolic_trace(lambda inputs: inputs[0].relu())
    observe(first, [[torch.randn(4)]], [False])


SAID = [
    ("its inputs are in a list", Opaque, inputs_in_a_list),
    ("an input is a torch._mkldnn tensor", Opaque, a_tensor_of_mkldnn),
    ("the symbolic size floor(s0/2)", Unemittable, a_size_that_no_tensor_has),
    ("an operand has an axis of its own", Unemittable, an_index_that_the_operand_has_not),
    ("an operand has an axis of its own", Unemittable, a_diagonal_of_an_operand),
    ("the higher-order operator wrap recorded no result", Opaque, a_body_without_a_result),
    ("an input is of a torch.func transform", Opaque, a_tensor_of_a_transform),
]


@pytest.mark.parametrize(
    ("reason", "error", "function"), SAID, ids=lambda x: getattr(x, "__name__", "")
)
def test_reason_said_by_a_function(reason: str, error: type[Exception], function: Any) -> None:
    with pytest.raises(error) as raised:
        function()
    assert reason in str(raised.value)


# No reason is without a test

SAYING = {"Unemittable", "Mismatch", "Opaque", "Decision"}
NAMES = {"why", "reason", "note"}
# The approximation of softmax attention has its own reasons, tested in test_piecewise_refusals.py.
ELSEWHERE = {"approximate.py", "piecewise_sparse.py"}
# Files where a reason is the value of a variable or of a function as well.
NAMING = {"linear_attention.py", "nearest.py", "normaliser.py", "rewrite.py", "select.py"}


def reasons() -> Iterator[str]:
    """The constant text of every reason in the sources, with … for what is filled in."""
    root = pathlib.Path(bla_inductor.__file__).parents[1]
    files = [*root.glob("bla_inductor/*.py"), *root.glob("bla_inductor/algebra/*.py")]
    for file in [*files, *root.glob("patterns/*.py")]:
        if file.name not in ELSEWHERE:
            for node in ast.walk(ast.parse(file.read_text())):
                yield from filter(None, map(_text, _said(node, file.name in NAMING)))


def _said(node: ast.AST, naming: bool) -> Iterator[ast.expr]:
    """The expressions in which a statement or a call says a reason."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAYING:
        first = node.args[0]
        pays = isinstance(first, ast.Constant) and first.value is True  # Decision(True, why)
        yield from [] if pays else node.args
    elif naming and isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in NAMES:
        yield from node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
    elif naming and isinstance(node, ast.Return) and node.value is not None:
        yield node.value


def _text(expression: ast.expr) -> str:
    if isinstance(expression, ast.JoinedStr):
        pieces = (str(getattr(part, "value", "")) for part in expression.values)
        constant = (isinstance(part, ast.Constant) for part in expression.values)
        return "".join(p if c else "…" for p, c in zip(pieces, constant, strict=True))
    value = getattr(expression, "value", None)
    return value if isinstance(expression, ast.Constant) and isinstance(value, str) else ""


def test_every_reason_is_in_this_file() -> None:
    known = [p.reason for p in PROGRAMS] + [reason for reason, *_ in [*ON_CUDA, *SAID]]
    known += [ONLY_REPORTED, "bfloat16 on a CPU that multiplies it"]  # test_cost.py

    def told(reason: str) -> bool:
        pieces = [piece for piece in reason.split("…") if len(piece) > 4]
        return any(k in reason or any(p[:20] in k for p in pieces) for k in known)

    found = list(reasons())
    assert len(found) > 40
    assert [reason for reason in found if not told(reason)] == []
