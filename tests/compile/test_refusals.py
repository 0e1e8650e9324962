"""Every reason for leaving something as it is, provoked by a program that a user could write.

A reason says what, where, why, and what to do; the table holds the words by which it is known.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import bla_inductor
from bla_inductor.cost import Problem, decide

Shape = tuple[int, ...]
BHND: Shape = (2, 3, 20, 8)
ND: Shape = (50, 8)


@dataclass(frozen=True)
class Program:
    """A function, its arguments, a piece of the reason, and how many matches there still are."""

    function: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    reason: str
    matches: int


PROGRAMS: list[Program] = []


def program(
    reason: str,
    *shapes: Shape,
    matches: int = 0,
    inputs: Callable[[], list[Tensor]] | None = None,
) -> Callable[[Any], Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        sizes = shapes or (BHND,) * 3
        make = inputs or (lambda: [torch.randn(s) for s in sizes])
        PROGRAMS.append(Program(function, make, reason, matches))
        return function

    return add


# What no operand can take in


@program("which no one of q, k, v has together", BHND, BHND, BHND, (3, 20, 20))
def position_bias(q, k, v, bias):
    return (q @ k.mT * bias) @ v


@program("which no one of q, k, v has together")
def causal_mask(q, k, v):
    at = torch.arange(q.shape[-2])
    return (q @ k.mT).masked_fill(at[:, None] < at, 0) @ v


@program("the result is expanded along an axis that no operand has", ND, ND, ND)
def expanded_by_a_product_with_ones(q, k, v):
    return torch.einsum("nc,cd,z->znd", q, k.T @ v, torch.ones(3))


@program("the result is spread over a diagonal", ND, ND, ND, matches=1)
def masked_result(q, k, v):
    diagonal = torch.arange(50)[:, None] == torch.arange(8)
    return torch.where(diagonal, q @ (k.T @ v), 0)


@program("the product is multiplied by zero")
def multiplied_by_zero(q, k, v):
    return q @ ((k * 0.0).mT @ v)


@program("a number is added to the product kᵀv, or bounds it")
def number_added_to_the_state(q, k, v):
    return q @ (k.mT @ v + 1.0)


@program("a number is added to the product kᵀv, or bounds it")
def clamped_state(q, k, v):
    return q @ (k.mT @ v).clamp(min=0)


# The divisor


@program("adds a term to the numerator before the division", matches=1)
def term_beside_the_numerator(q, k, v):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v) + 20 * v) / (q @ k.sum(-2).unsqueeze(-1) + 20)


@program(
    ": in it, `l_args_3_` couples the indices n and m", BHND, BHND, BHND, (3, 20, 20), matches=1
)
def bias_in_the_normaliser(q, k, v, bias):
    return q @ (k.mT @ v) / ((q @ k.mT * bias).sum(-1, keepdim=True) + 1)


@program("add it to the product instead, q·Σk + eps", matches=1)
def eps_added_to_the_key_sum(q, k, v):
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ (k.sum(-2) + 1e-6).unsqueeze(-1))


@program("is not a sum of q·k over the keys", matches=1)
def divisor_of_something_else(q, k, v):
    return q @ (k.mT @ v) / ((q * v).sum(-1, keepdim=True) + 30)


@program("comes between Σ q·k and the division", matches=1)
def root_of_the_normaliser(q, k, v):
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1).sqrt()


@program("the normaliser sums over another sequence than the numerator", ND, (8, 8), (8, 8), (9, 8))
def normaliser_of_other_keys(q, k, v, others):
    return q @ (k.T @ v) / (q @ others.sum(0)[:, None] + 30)


# What would not pay


@program("a product of three matrices with no long axis", (64, 32), (32, 4), (4, 32))
def low_rank_projection(x, a, b):
    return x @ a @ b


@program("its state kᵀv is read by other code as well")
def state_returned(q, k, v):
    state = k.mT @ v
    return q @ state, state


@program("its matrix of scores q·kᵀ is read by other code as well")
def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores @ v, scores


@program("its numerator is read by other code as well", (4, 8, 8), (4, 8, 8), (4, 8, 8))
def numerator_returned(q, k, v):
    out = q @ (k.mT @ v)
    return out / (q @ k.sum(-2).unsqueeze(-1) + 30.0), out


# What cannot be said in the graph


@program("write it out of place (x = x + y instead of x += y)")
def query_modified_in_between(q, k, v):
    q = q.relu()
    scores = q @ k.mT
    q.mul_(3.0)
    return scores @ v + q


@program("its result has strides that no kernel writes", ND, ND, ND, matches=1)
def slice_of_a_wider_product(q, k, v):
    return (q @ (k.T @ F.pad(v, (0, 1), value=1.0)))[..., :-1]


@program(
    "none of q, k, v is a floating-point tensor",
    inputs=lambda: [torch.ones(ND, dtype=torch.long)] * 3,
)
def integers(q, k, v):
    return q @ (k.T @ v)


@program(
    "the operator takes fp16, bf16, fp32 and fp64",
    inputs=lambda: [torch.randn(ND).to(torch.float8_e4m3fn)] * 3,
)
def eight_bits(q, k, v):
    return q.float() @ (k.float().T @ v.float())


@program(
    "an input is a TwoTensor, which is not looked into",
    inputs=lambda: [TwoTensor(torch.randn(ND), torch.randn(ND)) for _ in range(3)],
)
def tensor_subclass(q, k, v):
    return q @ (k.T @ v)


@program("compile the inner function")
def mapped(q, k, v):
    return torch.vmap(lambda q, k, v: q @ (k.mT @ v))(q, k, v)


# Nothing matched, and what came nearest


@program("scaled_dot_product_attention is softmax attention")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@program("a softmax stands between the two products")
def softmax_attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@program("put it on the output, or call model.eval()")
def dropout_on_the_scores(q, k, v):
    return F.dropout(q @ k.mT) @ v


@program("`tanh` stands between the two products")
def nonlinear_state(q, k, v):
    return q @ torch.tanh(k.mT @ v)


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda c: c.function.__name__)
def test_reason(case: Program) -> None:
    report = bla_inductor.explain(case.function, *case.inputs())
    assert len(report.matches) == case.matches
    found = [r for r in report.refusals if case.reason in r.reason]
    assert len(found) == 1, [r.reason for r in report.refusals]
    place = found[0].location
    if "TwoTensor" not in case.reason:  # that one is of a whole graph
        first = case.function.__code__.co_firstlineno
        assert place.file == __file__
        assert first <= place.line <= max(at for *_, at in case.function.__code__.co_lines() if at)


def test_one_refusal_a_place() -> None:
    """The reshapes that follow a refused product are not places of their own."""

    def model(q, k, v):
        out = (q @ k.mT).softmax(-1) @ v
        out = out.transpose(1, 2)
        return out.flatten(2)

    report = bla_inductor.explain(model, *[torch.randn(BHND) for _ in range(3)])
    assert len(report.refusals) == 1


def test_only_a_report_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_REWRITE", "off")
    x = torch.randn(ND)
    (refusal,) = bla_inductor.explain(lambda q, k, v: q @ (k.T @ v), x, x, x).refusals
    assert "asks for a report alone" in refusal.reason


# Reasons that need a GPU

CUDA: dict[str, Any] = {"batch": 8, "n": 1024, "m": 1024, "quadratic": False, "normalised": True}
ON_CUDA = [
    ("the kernels take at most", {"c": 512, "d": 64, "itemsize": 2}),
    ("the products are matrix-bound", {"c": 160, "d": 160, "itemsize": 2}),
    ("so the kernels would copy", {"c": 72, "d": 72, "itemsize": 2}),
    (
        "float32 at matmul precision 'highest'",
        {"c": 64, "d": 64, "itemsize": 4, "gradients": True, "float32": "highest"},
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


# No reason is without a test

RAISED = {"Unemittable", "Mismatch", "Opaque", "Decision"}
# What no program was found for. Each stands where the code would be wrong to go on.
UNPROVOKED = {
    "q, k and v are on different devices",
    "cannot be separated from it",
    "the symbolic size ",
    "an operand has an axis of its own",
    "the higher-order operator ",
    "the normaliser has no query axis of its own",
    "a mask that compares positions along ",
}


# The approximation of softmax attention has its own reasons, tested in test_piecewise_refusals.py.
ELSEWHERE = {"approximate.py", "piecewise_sparse.py"}


def reasons() -> Iterator[str]:
    """The constant text of every reason in the sources, with … for what is filled in."""
    root = pathlib.Path(bla_inductor.__file__).parents[1]
    files = [*root.glob("bla_inductor/**/*.py"), *root.glob("patterns/*.py")]
    for file in [file for file in files if file.name not in ELSEWHERE]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in RAISED:
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value
                elif isinstance(argument, ast.JoinedStr) and _declines(node):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in argument.values
                    )


def _declines(call: ast.Call) -> bool:
    first = call.args[0]
    return not (isinstance(first, ast.Constant) and first.value is True)


def test_every_reason_is_in_this_file() -> None:
    known = [p.reason for p in PROGRAMS] + [reason for reason, _ in ON_CUDA] + sorted(UNPROVOKED)

    def told(reason: str) -> bool:
        pieces = [piece for piece in reason.split("…") if len(piece) > 4]
        return any(k in reason or any(p[:20] in k for p in pieces) for k in known)

    found = list(reasons())
    assert len(found) > 20
    assert [reason for reason in found if not told(reason)] == []
