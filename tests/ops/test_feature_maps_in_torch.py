"""φ in torch operations, from its text, against what a user would write: value, first and second
derivative, where pieces meet, beyond overflow, outside the domain, and with NaN.
"""

from __future__ import annotations

import pytest
import torch
from feature_map_table import INFINITE, LARGE, PHI, POINTS, POINTWISE, ROW_WISE
from torch.fx.experimental.proxy_tensor import make_fx

from bla_inductor.ops.feature_torch import apply, gradient

f64 = torch.float64


def _derivatives(value, x, seed):
    """φ(x), its gradient for `seed`, and the gradient of that, weighted."""
    (first,) = torch.autograd.grad(value, x, seed, create_graph=True)
    if not first.requires_grad:
        return value, first, torch.zeros_like(x)
    weights = torch.linspace(0.5, 1.5, first.numel(), dtype=x.dtype).reshape(first.shape)
    (second,) = torch.autograd.grad(first, x, weights, allow_unused=True)
    return value, first, torch.zeros_like(x) if second is None else second


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_pointwise_maps_are_the_functions(name, dtype):
    text, function = POINTWISE[name]
    x = torch.tensor([*POINTS, *LARGE], dtype=dtype, requires_grad=True)
    seed = torch.linspace(-1, 2, len(x), dtype=dtype)
    exact, first, _ = _derivatives(function(x), x, seed)
    torch.testing.assert_close(apply(text, x), exact, equal_nan=True)
    torch.testing.assert_close(gradient(text, x, seed), first, equal_nan=True)


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_maps_are_the_functions(name):
    text, function = ROW_WISE[name]
    x = torch.randn(3, 5, 4, dtype=f64)
    x[0, 0], x[0, 1] = 0.0, 0.01
    x.requires_grad_()
    seed = torch.randn_like(x)
    exact, first, second = _derivatives(function(x), x, seed)
    torch.testing.assert_close(apply(text, x), exact, equal_nan=True)
    torch.testing.assert_close(gradient(text, x, seed), first, equal_nan=True)
    (own,) = torch.autograd.grad(gradient(text, x, seed), x, _weights(x))
    torch.testing.assert_close(own[0, 2:], second[0, 2:])
    torch.testing.assert_close(own[1:], second[1:])


def _weights(x):
    return torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)


@pytest.mark.parametrize("name", POINTWISE)
def test_second_derivatives_where_pieces_do_not_meet(name):
    text, function = POINTWISE[name]
    x = torch.tensor([0.3, -0.3, 1.7, -2.2, 4.5, -4.5, 25.0, *LARGE], dtype=f64, requires_grad=True)
    seed = torch.linspace(-1, 2, len(x), dtype=f64)
    *_, second = _derivatives(function(x), x, seed)
    own = gradient(text, x, seed)
    if own.requires_grad:
        (own,) = torch.autograd.grad(own, x, _weights(x), allow_unused=True)
    else:
        own = None
    own = torch.zeros_like(x) if own is None else own
    torch.testing.assert_close(own, second, equal_nan=True)


@pytest.mark.parametrize("name", INFINITE)
def test_infinity(name):
    text, function = POINTWISE[name]
    x = torch.tensor([float("inf"), -float("inf")], dtype=f64)
    torch.testing.assert_close(apply(text, x), function(x), equal_nan=True)


@pytest.mark.parametrize("name", PHI)
def test_nan_goes_through(name):
    x = torch.full((2, 3), 0.5, dtype=f64)
    x[1, 1] = float("nan")
    y = apply(PHI[name][0], x)
    assert y[1, 1].isnan()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("name", PHI)
def test_a_gradient_of_nan_stops_where_the_slope_is_zero(name):
    """As with torch, which selects: a zero slope times NaN would be NaN."""
    text, function = PHI[name]
    x = torch.tensor([[-4.0, 0.2, 7.0]], dtype=f64, requires_grad=True)
    seed = torch.full_like(x, float("nan"))
    (exact,) = torch.autograd.grad(function(x), x, seed)
    torch.testing.assert_close(gradient(text, x, seed), exact, equal_nan=True)


@pytest.mark.parametrize("name", PHI)
def test_the_dtype_is_kept(name):
    x = torch.rand(2, 3, dtype=f64)
    assert apply(PHI[name][0], x).dtype == f64
    assert gradient(PHI[name][0], x, x).dtype == f64


def test_traced_code_is_pointwise_and_small():
    text = POINTWISE["elu + 1"][0]
    graph = make_fx(lambda x, g: gradient(text, x, g))(torch.rand(4), torch.rand(4)).graph
    called = [n.target for n in graph.nodes if n.op == "call_function"]
    aten = torch.ops.aten
    assert called == [aten.gt.Scalar, aten.exp.default, aten.mul.Tensor, aten.where.self]


@pytest.mark.parametrize("name", ["elu + 1", "elu, one added"])
def test_elu_plus_one_keeps_its_digits(name):
    x = torch.linspace(-80, -10, 50)
    y = apply(PHI[name][0], x)
    torch.testing.assert_close(y, x.double().exp().float(), rtol=2e-7, atol=0)


def test_constants():
    x = torch.rand(2, 3, dtype=f64)
    assert torch.equal(apply("2.5", x), torch.full_like(x, 2.5))
    assert torch.equal(gradient("2.5", x, x), torch.zeros_like(x))
    steps = apply("Piecewise((0.1, x < 0.5), (0.7, True))", x)
    assert torch.equal(steps, torch.where(x < 0.5, 0.1 + torch.zeros_like(x), 0.7))
