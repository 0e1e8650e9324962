"""A graph run in fp64, whatever dtypes it names: what both graphs of a verification are held to.

`Wide` stands below autograd, forward and backward: a floating-point dtype in the arguments of an
operator is read as float64, complex ones as complex128, and no narrower tensor reaches an operator.
Autocast leaves fp64 alone. Random numbers are those of the original run, which `Drawn` notes down:
in fp64 a generator gives others.

Not handled, with `NoFp64`: memory read as another dtype, operators that draw and compute in one
(attention with dropout, rrelu), and whatever has no fp64 kernel.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WIDE", "Drawn", "NoFp64", "Wide", "generator_states", "same_states", "twin"]

aten = torch.ops.aten
WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
# Operators whose result is random numbers alone, so that it can be taken from another run.
_DRAWS = frozenset(
    {
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "native_dropout",
        "normal",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "random",
        "random_",
        "randperm",
        "uniform",
        "uniform_",
    }
)


class NoFp64(Exception):
    """The graph cannot be run in fp64; the text says why."""


def _name(operator: Any) -> str:
    return operator._schema.name.partition("::")[2]


def _random(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


class Drawn(TorchDispatchMode):
    """Notes what each random operator gives, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []
        self.mixed: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _random(func):
            return func(*args, **(kwargs or {}))
        before = generator_states()
        result = func(*args, **(kwargs or {}))
        if _name(func) in _DRAWS:
            self.calls.append((func, pytree.tree_map_only(Tensor, torch.clone, result)))
        elif not same_states(before, generator_states()):
            self.mixed.add(str(func))
        return result

    def replayable(self) -> list[tuple[Any, Any]]:
        """The calls; raises NoFp64 where an operator drew what nobody can take from its result."""
        for operator in self.mixed:
            raise NoFp64(f"{operator} draws random numbers and computes with them at once")
        return self.calls


def generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def same_states(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Wide(TorchDispatchMode):
    """Runs everything in fp64; drawn: the random numbers, from `Drawn.calls`."""

    def __init__(self, drawn: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self.drawn = deque(drawn)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.view.dtype:
            raise NoFp64("it reads memory as another dtype")
        in_place = func._schema.is_mutable
        args, kwargs = pytree.tree_map(lambda x: _wide(x, in_place), (args, kwargs or {}))
        if _random(func) and _name(func) in _DRAWS:
            return self._replayed(func, args)
        result = func(*args, **kwargs)
        if in_place or any(a.alias_info for a in func._schema.arguments):
            return result
        return pytree.tree_map(lambda x: _wide(x, False), result)  # made by a factory

    def _replayed(self, func: Any, args: Any) -> Any:
        nothing: tuple[Any, Any] = (None, None)
        known, result = self.drawn.popleft() if self.drawn else nothing
        if known is not func:
            raise NoFp64(f"it draws its random numbers in another way ({known}, {func})")
        if _name(func) == "native_dropout":
            x, p, train = args
            mask = result[1]
            return (x if train is False else x * mask * (0.0 if p == 1 else 1 / (1 - p))), mask
        return args[0].copy_(result) if func._schema.is_mutable else _wide(result, False)


def _wide(x: Any, in_place: bool) -> Any:
    if isinstance(x, torch.dtype):
        return WIDE.get(x, x)
    if isinstance(x, Tensor) and x.dtype in WIDE and not in_place:
        return x.to(WIDE[x.dtype])
    return x


def twin(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` over fp64 copies of its own parameters and buffers, where it has any."""
    owned = [*graph.parameters(), *graph.buffers()]
    return copy.deepcopy(graph).double() if owned else graph
