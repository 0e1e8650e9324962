"""φ and φ' as Triton functions, alone and in the operator. Not collected as it stands: run in the
interpreter by test_feature_map_kernels.py, and on a GPU by tests/gpu.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from bla_inductor.kernels.feature_map import compiled
from feature_map_table import INFINITE, LARGE, PHI, POINTS, POINTWISE, ROW_WISE

from bla_inductor.ops import dispatch
from bla_inductor.ops.feature_map import has_rows
from bla_inductor.ops.feature_torch import finite_at_zero

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf and NaN
NAN = float("nan")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@triton.jit
def kernel(
    X, G, Y, DX, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr, PHI: tl.constexpr,
    PHI_BACKWARD: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows) if FULL else (r < rows) & (c < cols)
    x = tl.load(X + r * COLS + c)
    g = tl.load(G + r * COLS + c)
    y = PHI(x, mask)
    dx = PHI_BACKWARD(x, g, mask)
    tl.static_assert(y.shape[0] == ROWS and y.shape[1] == COLS)
    tl.static_assert(dx.shape[0] == ROWS and dx.shape[1] == COLS)
    tl.store(Y + r * COLS + c, y)
    tl.store(DX + r * COLS + c, dx)


def run(text, x, g, rows=8, cols=16):
    """φ(x) and the gradient of x on a tile of 8 × 16 that is 0 outside rows × cols, as kernels load
    it. What becomes of that is 0 if the map looks at rows, and else a number.
    """
    tile = torch.zeros(2, 8, 16, device=DEVICE)
    tile[0, :rows, :cols], tile[1, :rows, :cols] = x, g
    results = torch.full((2, 8, 16), NAN, device=DEVICE)
    phi = compiled(text)
    kernel[(1,)](*tile, *results, rows, cols, 8, 16, cols == 16, phi.forward, phi.backward)
    results = results.cpu()
    if has_rows(text):
        assert torch.equal(results[:, rows:], torch.zeros(2, 8 - rows, 16))
        assert torch.equal(results[:, :, cols:], torch.zeros(2, 8, 16 - cols))
    elif finite_at_zero(text):
        assert results[:, rows:].isfinite().all()
        assert results[:, :, cols:].isfinite().all()
    return results[:, :rows, :cols]


def exact(function, x, g):
    wide = x.double().requires_grad_()
    y = function(wide)
    (dx,) = torch.autograd.grad(y, wide, g.double())
    return torch.stack([y.detach(), dx]).float()


@pytest.mark.parametrize(("rows", "cols"), [(8, 16), (5, 16), (5, 11)])
@pytest.mark.parametrize("name", PHI)
def test_value_and_gradient(name, rows, cols):
    text, function = PHI[name]
    x, g = 2 * torch.randn(rows, cols), torch.randn(rows, cols)
    torch.testing.assert_close(run(text, x, g, rows, cols), exact(function, x, g), equal_nan=True)


@pytest.mark.parametrize("name", POINTWISE)
def test_where_pieces_meet_and_where_they_overflow(name):
    text, function = POINTWISE[name]
    x = torch.tensor([*POINTS, *LARGE])
    x = torch.cat([x, torch.ones(5 * 16 - len(x))]).reshape(5, 16)
    wide = x.clone().requires_grad_()
    y = function(wide)
    (dx,) = torch.autograd.grad(y.sum(), wide)
    ours = run(text, x, torch.ones_like(x), 5)
    torch.testing.assert_close(ours, torch.stack([y.detach(), dx]), equal_nan=True)


@pytest.mark.parametrize("name", ROW_WISE)
def test_rows_of_zeros_and_below_eps(name):
    text, function = ROW_WISE[name]
    x, g = torch.randn(4, 11), torch.randn(4, 11)
    x[0], x[1] = 0.0, 0.01 * x[1]
    torch.testing.assert_close(run(text, x, g, 4, 11), exact(function, x, g), equal_nan=True)


@pytest.mark.parametrize("name", INFINITE)
def test_infinity(name):
    text, function = POINTWISE[name]
    x = torch.full((8, 16), float("inf")) * (1 - 2 * (torch.arange(16) % 2))
    y, _ = run(text, x, torch.ones_like(x))
    torch.testing.assert_close(y, function(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("name", PHI)
def test_nan_goes_through_and_stays_in_its_row(name):
    x, g = torch.rand(4, 11) + 0.5, torch.rand(4, 11)
    x[1, 2] = NAN
    y, dx = run(PHI[name][0], x, g, 4, 11)
    assert y[1, 2].isnan()
    rest = [0, 2, 3]
    assert y[rest].isfinite().all()
    assert dx[rest].isfinite().all()


@pytest.mark.parametrize("name", ["expm1", "log1p", "tanh"])
def test_digits_near_zero(name):
    text, function = POINTWISE[name]
    x = torch.logspace(-12, 0, 128).reshape(8, 16) * (1 - 2 * (torch.arange(16) % 2))
    x = x * 0.99
    y, _ = run(text, x, x)
    torch.testing.assert_close(y, function(x.double()).float(), rtol=4e-7, atol=0)


def test_elu_plus_one_keeps_its_digits():
    """To what the interpreter's exp2, without an exact fma, makes of exp."""
    x = torch.linspace(-80, -10, 128).reshape(8, 16)
    y, _ = run(PHI["elu, one added"][0], x, x)
    torch.testing.assert_close(y, x.double().exp().float(), rtol=1e-5, atol=0)


def test_identity():
    x, g = torch.randn(5, 11), torch.randn(5, 11)
    assert torch.equal(run("", x, g, 5, 11), torch.stack([x, g]))


def test_constants_fill_the_tile():
    x, g = torch.randn(5, 16), torch.randn(5, 16)
    y, dx = run("2.5", x, g, 5)
    assert torch.equal(y, torch.full_like(x, 2.5))
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("weight", [None, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_operators_cuda_path_hands_everything_to_the_kernels(weight, decoupled):
    q, k, v = torch.randn(2, 3, 20, 16), torch.randn(2, 1, 25, 16), torch.randn(2, 3, 25, 24)
    norms = (torch.randn(2, 3, 20, 8), torch.randn(1, 1, 25, 8)) if decoupled else (None, None)
    w = None if weight is None else (torch.rand(2, 1, 25) - 0.3).ceil().to(weight)
    arguments = {"q_map": PHI["elu + 1"][0], "k_map": "softmax", "normalizer": "add", "eps": 0.5}
    arguments |= {"scale": 0.7, "norm_scale": 0.3}
    if decoupled:
        arguments |= {"q_norm_map": "sigmoid(x)", "k_norm_map": "l2(add=0.5) -> exp(x)"}
    tensors = [t if t is None else t.to(DEVICE) for t in (q, k, v, *norms, w)]
    ours = dispatch._forward_cuda(*tensors, **arguments)
    exact = dispatch._forward_aten(*tensors, **arguments)
    torch.testing.assert_close(ours, exact)
    needs = [t is not None and t.is_floating_point() for t in tensors]
    rest = (torch.randn_like(exact[0]), *tensors, *exact[1:])
    ours, exact = (
        run(*rest, **arguments, needs=needs)
        for run in (dispatch._backward_cuda, dispatch._backward_aten)
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.float(), b.float())  # fp32 sums, whatever the weights' dtype
        assert a.dtype == b.dtype
