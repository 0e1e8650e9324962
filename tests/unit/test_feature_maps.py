"""φ as it is captured: which tensor it starts from, and that its expression is the function."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from bla_inductor.patterns.feature_maps import RowWise, X, capture
from torch import fx

from bla_inductor.algebra import observe
from bla_inductor.ops.feature_torch import apply, gradient

SHAPE = (2, 3, 10, 4)
RELU = sympy.Piecewise((0, X <= 0), (X, True))


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
    "elu": lambda x: F.elu(x, alpha=0.5),
    "relu_eps": lambda x: F.relu(x) + 1e-6,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "silu": F.silu,
    "silu_by_hand": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "square": lambda x: x**2,
    "relu_squared": lambda x: F.relu(x).square(),
    "cubed": lambda x: x * x * x,
    "power": lambda x: x.abs() ** 1.5,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "scaled": lambda x: F.relu(x * 0.25 - 1),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "clamped": lambda x: x.clamp(-0.5, 0.75),
    "clamped_below": lambda x: x.clamp(min=0.5),
    "clamped_above": lambda x: x.clamp(max=0.5),
    "relu6": F.relu6,
    "abs": torch.abs,
    "sqrt_of_square": lambda x: torch.sqrt(x**2 + 1),
    "rsqrt": lambda x: x * torch.rsqrt(x**2 + 1),
    "chain": lambda x: torch.sqrt(F.elu(x / 3).float() + 1.5).neg().exp(),
    "quotient": lambda x: torch.exp(x) / (torch.exp(x) + 1),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_the_expression_is_the_function(name) -> None:
    """With the points where pieces meet, and with the derivative that torch has there."""
    function = POINTWISE[name]
    found = captured(function)
    assert found.leaf.node.name == "q"
    assert len(found.stages) == 1
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, requires_grad=True)
    exact = function(x).double()
    seed = torch.linspace(-1, 2, 65, dtype=x.dtype)
    torch.testing.assert_close(apply(found.text, x), exact)
    (slope,) = torch.autograd.grad(exact, x, seed)
    torch.testing.assert_close(gradient(found.text, x, seed), slope)
    assert apply(found.text, x.detach() * float("nan")).isnan().all()


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
        (lambda x: F.normalize(x, p=1, dim=-1), [RowWise("l1", 1e-12)]),
        (lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.5), [RowWise("l2", 0.5, "add")]),
        (lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=0.5), [RowWise("l2", 0.5)]),
        (lambda x: x / x.norm(dim=-1, keepdim=True), [RowWise("l2")]),
        (
            lambda x: F.normalize(F.relu(x), dim=-1),
            [RELU, RowWise("l2", 1e-12)],
        ),
    ],
)
def test_row_wise_stages(phi, stages) -> None:
    found = captured(phi)
    assert found.leaf.node.name == "q"
    assert list(found.stages) == stages
    x = torch.randn(SHAPE, dtype=torch.float64)
    scale = 0.5 if stages[0] == 2.0 * X else 1.0  # the coefficient of the product
    torch.testing.assert_close(apply(found.text, x) * scale, phi(x))


@pytest.mark.parametrize(
    ("phi", "leaf"),
    [
        (lambda x: x.softmax(-2), "softmax"),
        (lambda x: F.normalize(x, dim=-2), "normalize"),
        (lambda x: F.normalize(x, p=3, dim=-1), "normalize"),
        (lambda x: F.relu(x.cumsum(-1)), "cumsum"),
        (lambda x: F.relu(x) + x.mean(-1, keepdim=True), "add"),
    ],
)
def test_what_mixes_positions_ends_the_feature_map(phi, leaf) -> None:
    assert captured(phi).leaf.node.name == leaf


@pytest.mark.parametrize(
    "guard",
    [
        lambda norm: norm.clamp(0.5, 2),
        lambda norm: norm.clamp(max=2),
        lambda norm: torch.add(norm, 0.5, alpha=2),
    ],
)
def test_a_norm_with_another_guard_is_no_stage(guard) -> None:
    assert captured(lambda x: x / guard(x.norm(dim=-1, keepdim=True))) is None


def test_parameters_end_the_feature_map() -> None:
    found = captured(lambda q, w: F.relu(q * w), (4,), fixed=(True,))
    assert found.leaf.node.name == "mul"
    assert found.stages == (RELU,)
