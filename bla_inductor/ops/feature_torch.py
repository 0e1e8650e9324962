"""φ and its gradient in torch operations: traceable, fusible, and differentiable themselves.

`apply(text, x)` is φ(x), and `gradient(text, x, g)` the gradient of x where g is that of φ(x). All
have the shape and dtype of x, fp32 or fp64; row-wise stages work on the last dim.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bla_inductor.ops.feature_code import Writer
from bla_inductor.ops.feature_map import RowWise, parse

__all__ = ["apply", "finite_at_zero", "gradient"]


def apply(text: str, x: Tensor) -> Tensor:
    """φ(x)."""
    return _functions(text)[0](x) if text else x


def gradient(text: str, x: Tensor, g: Tensor) -> Tensor:
    """The gradient of x, where g is that of φ(x)."""
    return _functions(text)[1](x, g) if text else g


@functools.cache
def finite_at_zero(text: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether φ(0), rounded to `dtype`, and φ'(0) are numbers. The kernels fill their tiles up with
    zeros, and multiply what φ makes of them by zero.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        zero = torch.zeros(1, 2)
        value = apply(text, zero).to(dtype)
        return bool((value + gradient(text, zero, zero + 1)).isfinite().all())


@functools.cache
def _functions(text: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    stages = parse(text)
    forward, backward = _TorchWriter(), _TorchWriter()
    value, slope = forward.forward(stages, "x"), backward.gradient(stages, "x", "g")
    return _function("x", forward.lines, value), _function("x, g", backward.lines, slope)


def _function(parameters: str, lines: Sequence[str], result: str) -> Callable[..., Tensor]:
    if not result.isidentifier():
        result = f"torch.full_like(x, {result})"
    last = {name: i for i, line in enumerate(lines) for name in re.findall(r"\bt\d+\b", line)}
    body = []
    for i, line in enumerate(lines):
        # Eager memory: a temporary goes after its last use, as in a nested expression.
        done = [name for name, use in last.items() if use == i and name != result]
        body += [line, *([f"del {', '.join(done)}"] if done else [])]
    source = "\n    ".join([f"def function({parameters}):", *body, f"return {result}"])
    scope = {"torch": torch, "only": _only}
    exec(compile(source, "<feature map>", "exec"), scope)
    return scope["function"]  # type: ignore[return-value]


def _only(x: Tensor, taken: Sequence[Tensor], passed: Sequence[Tensor]) -> Tensor:
    """x, with a derivative only where `taken` hold and `passed` do not.

    What autograd makes of a piece where another one is used is 0 · slope: NaN where the slope
    overflows. Behind this it is 0.
    """
    if not x.requires_grad:
        return x
    mask = functools.reduce(torch.logical_and, [*taken, *(~p for p in passed)])
    return torch.where(mask, x, x.detach())


class _TorchWriter(Writer):
    functions = {  # noqa: RUF012
        name: f"torch.{name}"
        for name in (
            "exp", "expm1", "log", "log1p", "sqrt", "abs", "sign", "sigmoid", "tanh", "erf", "sin",
            "cos",
        )
    }  # fmt: skip

    def where(self, condition: str, a: str, b: str) -> str:
        if not a.isidentifier() and not b.isidentifier():
            a = f"x.new_full((), {a})"  # two numbers would make fp32 of an fp64 x
        return f"torch.where({condition}, {a}, {b})"

    def power(self, u: str, exponent: str) -> str:
        return f"torch.pow({u}, {exponent})"

    def exponential(self, base: str, u: str) -> str:
        return f"torch.pow({base}, {u})"

    def piece(self, x: str, taken: Sequence[str], passed: Sequence[str]) -> str:
        return self.let(f"only({x}, [{', '.join(taken)}], [{', '.join(passed)}])")

    def row(self, stage: RowWise, x: str) -> str:
        if stage.kind == "softmax":
            return self.let(f"torch.softmax({x}, -1)")
        return self.let(f"{x} / {self._guarded(stage, self._norm(stage, x))}")

    def row_gradient(self, stage: RowWise, x: str, y: str, g: str) -> str:
        product = self.let(f"({g} * {y}).sum(-1, keepdim=True)")
        if stage.kind == "softmax":
            return self.let(f"{y} * ({g} - {product})")
        norm = self._norm(stage, x)
        slope = f"torch.sign({x})" if stage.kind == "l1" else f"{x} / {self._nonzero(norm)}"
        if stage.eps and stage.guard == "max":
            product = self.let(f"torch.where({norm} >= {stage.eps!r}, {product}, 0.0)")
        return self.let(f"({g} - {self.let(slope)} * {product}) / {self._guarded(stage, norm)}")

    def _norm(self, stage: RowWise, x: str) -> str:
        order = {"l1": 1, "l2": 2}[stage.kind]
        return self.let(f"torch.linalg.vector_norm({x}, {order}, -1, keepdim=True)")

    def _guarded(self, stage: RowWise, norm: str) -> str:
        if not stage.eps:
            return norm
        if stage.guard == "add":
            return self.let(f"{norm} + {stage.eps!r}")
        return self.let(f"{norm}.clamp(min={stage.eps!r})")

    def _nonzero(self, norm: str) -> str:
        """The norm, or 1: the derivative of ‖x‖₂ at 0 is 0."""
        return self.let(f"torch.where({norm} > 0.0, {norm}, 1.0)")
