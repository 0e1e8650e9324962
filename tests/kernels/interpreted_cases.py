"""How the kernels are run in Triton's interpreter and compared with the formula."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from bla_inductor.kernels import launching, short_heuristics
from linear_attention_formula import (
    FACTOR,
    NAMES,
    heads_inside,
    plain,
    relative_error,
)

from bla_inductor import kernels
from bla_inductor.ops.layout import key_batch

fp16, fp32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer starts as NaN, so that an element nobody wrote is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))


ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
FUNCTIONS = {
    "": lambda x: x,
    # Not with clamp: since torch 2.14 its derivative at 0 is 0, and half of the entries are 0.
    ELU1: lambda x: torch.where(x > 0, x + 1, torch.where(x > 0, 0.0, x).exp()),
    "softmax": lambda x: x.softmax(-1),
    "1/x": lambda x: 1 / x,
}


def with_maps(maps):
    """`plain` of the mapped and weighted inputs."""

    def function(q, k, v, q_norm=None, k_norm=None, key_weight=None, **keywords):
        if key_weight is not None:
            key_weight = key_weight.unsqueeze(-1)
        q, k, q_norm, k_norm = (
            t if t is None else FUNCTIONS[text](t)
            for t, text in zip((q, k, q_norm, k_norm), maps, strict=True)
        )
        if key_weight is not None:
            k = k * key_weight
            k_norm = None if k_norm is None else k_norm * key_weight
        return plain(q, k, v, q_norm, k_norm, **keywords)

    return function


def check(
    tensors,
    do,
    needs=(True,) * 6,
    normalizer="add",
    scale=0.7,
    norm_scale=0.3,
    eps=0.125,
    maps=("",) * 4,
):
    """Forward and backward of the kernels within the naive graph's error; returns what they
    wrote.
    """
    tensors = (*tensors, *(None,) * (6 - len(tensors)))
    q, k, v, _, k_norm, weight = tensors
    numbers = (maps, normalizer, scale, norm_scale, eps)
    out = torch.full_like(do, float("nan"))
    state, key_sum = kernels.forward(out, *tensors, key_batch(k, v, k_norm, weight), *numbers)
    differentiable = [t is not None and t.is_floating_point() for t in tensors]
    grads = [
        torch.full_like(t, float("nan")) if given and need else None
        for t, given, need in zip(tensors, differentiable, needs, strict=True)
    ]
    kernels.backward(grads, do, *tensors, state, key_sum, *numbers)
    names = (*NAMES[:5], "dkey_weight")
    ours = {"out": out, **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}
    keywords = {"normalizer": normalizer, "scale": scale}
    if normalizer != "none":
        keywords |= {"norm_scale": norm_scale, "eps": eps}
    wide = [t.double() if given else t for t, given in zip(tensors, differentiable, strict=True)]
    function = with_maps(maps)
    exact = gradients(function, wide, do.double(), names, **keywords)
    upcast = {} if do.dtype == q.dtype else {"out_dtype": do.dtype}
    naive = gradients(function, tensors, do, names, **keywords, **upcast)
    for name, value in ours.items():
        rounded = relative_error(exact[name].to(value.dtype), exact[name])
        # The interpreter sums one block of rows after the other, a CPU in a tree: up to twice the
        # error in fp32.
        factor = 2.5 if value.dtype == fp32 else FACTOR[value.dtype]
        budget = factor * max(relative_error(naive[name], exact[name]), rounded)
        error = relative_error(value, exact[name])
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"
    return ours


def signed(*shape, dtype):
    return heads_inside(*shape, dtype=dtype, signed=True)


def weights(m):
    return torch.rand(1, 2, m).half() + 0.5


def gradients(function, tensors, do, names, **keywords):
    """The output and the gradient of every given floating tensor, by name."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    out = function(*leaves, **keywords)
    given = [
        (n, t) for n, t in zip(names, leaves, strict=True) if t is not None and t.requires_grad
    ]
    grads = torch.autograd.grad(out, [t for _, t in given], do.to(out.dtype))
    return {"out": out.detach(), **{n: g for (n, _), g in zip(given, grads, strict=True)}}


def inputs(n, m, d, dv, dtype, make=heads_inside, h=2):
    q, k = make(1, h, n, d, dtype=dtype), make(1, h, m, d, dtype=dtype)
    v = torch.randn(1, h, m, dv).to(dtype)
    return (q, k, v), torch.randn(1, h, n, dv).to(dtype)


def in_several_launches(monkeypatch):
    for name in ("short_forward_parts", "short_backward_parts"):
        monkeypatch.setattr(short_heuristics, name, lambda *_: 0)


def constants_seen(monkeypatch, name):
    """The largest constant `name` of the launches by kernel, once kernels have run."""
    seen = {}
    original = launching.run

    def run(kernel, *args, **constants):
        if name in constants:
            before = seen.get(kernel.fn.__name__, 0)
            seen[kernel.fn.__name__] = max(before, constants[name])
        return original(kernel, *args, **constants)

    monkeypatch.setattr(launching, "run", run)
    return seen
