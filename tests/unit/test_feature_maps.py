"""φ as it is captured: which tensor it starts from, and that its expression is the function."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from bla_inductor.patterns.feature_maps import RowWise, X, capture
from torch import fx

from bla_inductor.algebra import observe

SHAPE = (2, 3, 10, 4)


def captured(phi, *more, fixed=()):
    gm = fx.symbolic_trace((lambda q, w: phi(q, w)) if more else (lambda q: phi(q)))
    inputs = [torch.empty(SHAPE), *(torch.empty(s) for s in more)]
    seen = observe(gm, inputs, [False, *fixed])
    assert seen.errors == []
    (out,) = gm.graph.find_nodes(op="output")
    value = seen.values[out.args[0]]
    return capture(value.term.factors, value.axes[-1])


POINTWISE = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu_eps": lambda x: F.relu(x) + 1e-6,
    "exp": torch.exp,
    "silu": F.silu,
    "silu_by_hand": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "square": lambda x: x**2,
    "relu_squared": lambda x: F.relu(x).square(),
    "cubed": lambda x: x * x * x,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "softplus": F.softplus,
    "scaled": lambda x: F.relu(x * 0.25 - 1),
    "hardswish": F.hardswish,
    "clamped": lambda x: x.clamp(-0.5, 0.75),
    "relu6": F.relu6,
    "chain": lambda x: torch.sqrt(F.elu(x / 3).float() + 1.5).neg().exp(),
    "quotient": lambda x: torch.exp(x) / (torch.exp(x) + 1),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_the_expression_is_the_function(name) -> None:
    found = captured(POINTWISE[name])
    assert found.leaf.node.name == "q"
    (expr,) = found.stages
    x = torch.linspace(-4, 4, 65, dtype=torch.float64)
    by_sympy = [float(expr.subs(X, v)) for v in x.tolist()]
    torch.testing.assert_close(torch.tensor(by_sympy, dtype=x.dtype), POINTWISE[name](x).double())


def test_identity() -> None:
    found = captured(lambda x: x.transpose(1, 2).transpose(1, 2))
    assert found.identity
    assert str(found) == "x"


@pytest.mark.parametrize(
    ("phi", "stages"),
    [
        (lambda x: x.softmax(-1), [RowWise("softmax")]),
        # a factor outside the feature map is a coefficient of the product, not a stage
        (lambda x: (x * 2).softmax(-1) * 0.5, [2.0 * X, RowWise("softmax")]),
        (lambda x: F.normalize(x, dim=-1), [RowWise("l2", 1e-12)]),
        (lambda x: x / x.norm(dim=-1, keepdim=True), [RowWise("l2")]),
        (
            lambda x: F.normalize(F.relu(x), dim=-1),
            [sympy.Piecewise((X, X > 0), (0, True)), RowWise("l2", 1e-12)],
        ),
    ],
)
def test_row_wise_stages(phi, stages) -> None:
    found = captured(phi)
    assert found.leaf.node.name == "q"
    assert list(found.stages) == stages


@pytest.mark.parametrize(
    ("phi", "leaf"),
    [
        (lambda x: x.softmax(-2), "softmax"),
        (lambda x: F.normalize(x, dim=-2), "normalize"),
        (lambda x: F.relu(x.cumsum(-1)), "cumsum"),
        (lambda x: F.relu(x) + x.mean(-1, keepdim=True), "add"),
    ],
)
def test_what_mixes_positions_ends_the_feature_map(phi, leaf) -> None:
    assert captured(phi).leaf.node.name == leaf


def test_parameters_end_the_feature_map() -> None:
    found = captured(lambda q, w: F.relu(q * w), (4,), fixed=(True,))
    assert found.leaf.node.name == "mul"
    assert found.stages == (sympy.Piecewise((X, X > 0), (0, True)),)
