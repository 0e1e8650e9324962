"""Feature maps twice: the text that the operators take, and what a user would write in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bla_inductor.compat import clamp_is_flat_at_its_bounds

RELU = "Piecewise((0, x <= 0), (x, True))"

POINTWISE = {
    "elu + 1": ("Piecewise((x + 1, x > 0), (exp(x), True))", lambda x: F.elu(x) + 1),
    "elu, one added": (
        "Piecewise((x, x > 0), (exp(x) - 1, True)) + 1",
        lambda x: torch.where(x > 0, x + 1, torch.where(x > 0, 0, x).exp()),
    ),
    "elu": ("Piecewise((x, x > 0), (exp(x) - 1, True))", F.elu),
    "relu": (RELU, F.relu),
    "relu + eps": (f"{RELU} + 1e-6", lambda x: F.relu(x) + 1e-6),
    "relu squared": (f"{RELU}**2", lambda x: F.relu(x).square()),
    "leaky relu": ("Piecewise((x, x > 0), (0.2*x, True))", lambda x: F.leaky_relu(x, 0.2)),
    "relu6": ("Piecewise((0, x <= 0), (6, x >= 6), (x, True))", F.relu6),
    "clamp": (
        "Piecewise((-0.5, x <= -0.5), (0.75, x >= 0.75), (x, True))"
        if clamp_is_flat_at_its_bounds()
        else "Piecewise((-0.5, x < -0.5), (0.75, x > 0.75), (x, True))",
        lambda x: x.clamp(-0.5, 0.75),
    ),
    "hard swish": ("Piecewise((0, x <= -3), (x, x >= 3), (x*(x + 3)/6, True))", F.hardswish),
    "exp": ("exp(x)", torch.exp),
    "exp2": ("2**x", torch.exp2),
    "silu": ("x*sigmoid(x)", F.silu),
    "silu by hand": ("x/(1 + exp(-x))", F.silu),
    "sigmoid": ("sigmoid(x)", torch.sigmoid),
    "gelu": ("x*(1 + erf(x/sqrt(2)))/2", F.gelu),
    "gelu tanh": (
        "x*(1 + tanh(sqrt(2/pi)*(x + 0.044715*x**3)))/2",
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "tanh": ("tanh(x)", torch.tanh),
    "softplus": ("Piecewise((x, x > 20), (log(1 + exp(x)), True))", F.softplus),
    "square": ("x**2", lambda x: x**2),
    "cube": ("x**3", lambda x: x**3),
    "abs": ("abs(x)", torch.abs),
    "sine": ("sin(x) + cos(2*x)", lambda x: torch.sin(x) + torch.cos(2 * x)),
    "sqrt": ("sqrt(x)", torch.sqrt),
    "rsqrt": ("1/sqrt(x)", torch.rsqrt),
    "power 1.5": ("x**1.5", lambda x: x**1.5),
    "power 0.3": ("x**0.3", lambda x: x**0.3),
    "log": ("log(x)", torch.log),
    "log1p": ("log1p(x)", torch.log1p),
    "expm1": ("expm1(x)", torch.expm1),
    "reciprocal": ("1/x", torch.reciprocal),
    "in two stages": ("sqrt(x) -> x**2", lambda x: torch.sqrt(x) ** 2),
    "affine": ("0.25*x - 1", lambda x: 0.25 * x - 1),
}

ROW_WISE = {
    "softmax": ("softmax", lambda x: x.softmax(-1)),
    "scaled softmax": ("2*x -> softmax", lambda x: (2 * x).softmax(-1)),
    "l2": ("l2", lambda x: x / x.norm(dim=-1, keepdim=True)),
    "l2 max": ("l2(max=0.5)", lambda x: F.normalize(x, dim=-1, eps=0.5)),
    "l2 add": ("l2(add=0.5)", lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.5)),
    "l1 max": ("l1(max=0.5)", lambda x: F.normalize(x, p=1, dim=-1, eps=0.5)),
    "l1 add": (
        "l1(add=0.5)",
        lambda x: x / (torch.linalg.vector_norm(x, 1, -1, keepdim=True) + 0.5),
    ),
    "relu, l2": (f"{RELU} -> l2(max=1e-12)", lambda x: F.normalize(F.relu(x), dim=-1)),
    "relu, cube, l2": (
        f"{RELU}**3 -> l2(max=1e-12)",
        lambda x: F.normalize(F.relu(x) ** 3, dim=-1),
    ),
    "log softmax": ("softmax -> log(x)", lambda x: x.log_softmax(-1)),
    "softmax, square": ("softmax -> x**2 + 1", lambda x: x.softmax(-1).square() + 1),
}

PHI = POINTWISE | ROW_WISE

# At -inf torch's hard swish is NaN, here 0, and its powers are inf, here NaN as for any x < 0.
INFINITE = [name for name in POINTWISE if name not in ("hard swish", "power 1.5", "power 0.3")]

# Where pieces meet, where an unused piece overflows, and where functions leave their domain.
POINTS = [0.0, -0.0, -0.5, 0.5, 0.75, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, 1e-3, -1e-3, 1e-9, -7.3]
LARGE = [50.0, -50.0, 800.0, -800.0]
