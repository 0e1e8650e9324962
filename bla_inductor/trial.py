"""Runs of one graph, forward and backward, on copies: nothing outside sees that they happened.

Every run starts from the same state of the random number generators, which is put back afterwards;
the incoming gradients are the same random numbers; gradients go to detached leaves. What a graph
writes to (an input, a buffer) is a copy, or put back. The run in fp64 is that of `fp64.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bla_inductor.compat import without_compiled_autograd
from bla_inductor.fp64 import generator_states, same_states

__all__ = ["Copies", "Results", "changed_by", "duplicates", "put_back", "run", "varied"]


@dataclass(slots=True)
class Results:
    """outputs: the graph's, flat; after: what each argument holds afterwards; owned: what the
    graph's own buffers do; gradients: of the inputs numbered `wanted` and of the graph's own
    parameters, zeros where there are none; drew: random numbers were drawn.
    """

    outputs: list[Any]
    after: list[Any]
    owned: list[Tensor]
    gradients: list[Tensor]
    wanted: list[int]
    drew: bool


@dataclass(slots=True)
class Copies:
    """What one run is given: the arguments, and the leaves whose gradients are wanted."""

    arguments: list[Any]
    leaves: list[Tensor]
    wanted: list[int]  # the inputs whose leaves these are

    @classmethod
    def of(cls, inputs: Sequence[Any], dtypes: dict[torch.dtype, torch.dtype]) -> Copies:
        """Copies of `inputs` with their strides, which share memory as the inputs do, cast where
        `dtypes` says so.
        """
        return cls._made(inputs, duplicates(inputs, dtypes))

    @classmethod
    def where(cls, inputs: Sequence[Any], changed: Sequence[bool]) -> Copies:
        """The inputs themselves, detached, and copies of those that are written to.

        A copy of a weight would be a static input at another address to a CUDA graph.
        """
        made = duplicates([x if c else None for x, c in zip(inputs, changed, strict=True)], {})
        aliases = [
            copy if c else x.detach() if isinstance(x, Tensor) else x
            for x, copy, c in zip(inputs, made, changed, strict=True)
        ]
        return cls._made(inputs, aliases)

    @classmethod
    def _made(cls, inputs: Sequence[Any], made: Sequence[Any]) -> Copies:
        arguments = list(made)
        leaves: list[Tensor] = []
        wanted: list[int] = []
        shared = _sharers(inputs)
        for i, x in enumerate(inputs):
            if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
                continue
            leaf = made[i].requires_grad_()
            leaves.append(leaf)
            wanted.append(i)
            if not x.is_leaf and shared[_memory(x)] == 1:
                # It may be written to, which a leaf may not. A copy with the strides of x.
                copy = leaf.clone()
                arguments[i] = copy if copy.stride() == leaf.stride() else leaf
        return cls(arguments, leaves, wanted)


def duplicates(inputs: Sequence[Any], dtypes: dict[torch.dtype, torch.dtype]) -> list[Any]:
    """Copies of the tensors, with the same strides and sharing memory in the same way."""
    shared = _sharers(inputs)
    bases: dict[int, Tensor] = {}
    made: list[Any] = []
    for x in inputs:
        if not isinstance(x, Tensor):
            made.append(x)
            continue
        x = x.detach()
        wide = dtypes.get(x.dtype, x.dtype)
        if shared[_memory(x)] == 1:
            copy = x.to(wide, copy=True)
            if copy.stride() == x.stride():
                made.append(copy)
                continue
        base = bases.get(_memory(x))
        if base is None:
            flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
            base = bases[_memory(x)] = flat.to(wide, copy=True)
        if base.dtype != wide:
            raise ValueError("inputs of several dtypes share memory")
        made.append(base.as_strided(x.shape, x.stride(), x.storage_offset()))
    return made


def varied(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Inputs of the same kind, other numbers by up to 6 %; zeros and infinities stay."""
    made = []
    for x, copy in zip(inputs, duplicates(inputs, {}), strict=True):
        if isinstance(x, Tensor):
            expanded = any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
            if x.is_floating_point() and not expanded:
                generator = torch.Generator(x.device).manual_seed(seed)
                noise = torch.rand(x.shape, generator=generator, device=x.device) - 0.5
                copy.mul_((1 + noise / 8).to(x.dtype))
            copy.requires_grad_(x.requires_grad)
            if x.requires_grad and not x.is_leaf:
                copy = copy.view_as(copy)
        made.append(copy)
    return made


def _sharers(inputs: Sequence[Any]) -> Counter[int]:
    return Counter(_memory(x) for x in inputs if isinstance(x, Tensor))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def changed_by(results: Results, inputs: Sequence[Any]) -> list[bool]:
    """Which inputs the run has written to; with one, all that share its memory."""
    changed = [
        isinstance(x, Tensor) and not _same(after, x)
        for x, after in zip(inputs, results.after, strict=True)
    ]
    written = {_memory(x) for x, c in zip(inputs, changed, strict=True) if c}
    return [isinstance(x, Tensor) and _memory(x) in written for x in inputs]


def _same(a: Tensor, b: Tensor) -> bool:
    # Values and not versions: batch_norm does not count up that of its running statistics.
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def run(
    function: Callable[..., Any],
    owner: fx.GraphModule,
    copies: Copies,
    mode: contextlib.AbstractContextManager[Any] | None = None,
) -> Results:
    """Call `function` and differentiate it, both under `mode`. Raises what it raises.

    owner: the graph module whose parameters and buffers the function uses.
    """
    mode = mode or contextlib.nullcontext()
    owned = [*owner.parameters(), *owner.buffers()]
    weights = [p for p in owner.parameters() if p.requires_grad and torch.is_grad_enabled()]
    with _undisturbed(owned):
        states = generator_states()
        with mode:
            outputs = pytree.tree_leaves(function(*copies.arguments))
        leaves = [*copies.leaves, *weights]
        roots = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        gradients: list[Any] = [None] * len(leaves)
        if roots and leaves:
            incoming = [_incoming(x) for x in roots]
            with mode:
                found = torch.autograd.grad(roots, leaves, incoming, allow_unused=True)
            gradients = list(found)
        filled = [
            torch.zeros_like(x) if g is None else g.detach()
            for x, g in zip(leaves, gradients, strict=True)
        ]
        return Results(
            [_kept(x, bool(owned)) for x in outputs],
            [_kept(x, False) for x in copies.arguments],
            [x.detach().clone() for x in owner.buffers()],
            filled,
            copies.wanted,
            not same_states(states, generator_states()),
        )


def _kept(x: Any, copy: bool) -> Any:
    """Detached, and out of the memory that is put back."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone() if copy else x.detach()


def _incoming(x: Tensor) -> Tensor:
    """The same numbers for `x` in any dtype: multiples of 1/64, which bfloat16 holds exactly."""
    generator = torch.Generator(x.device).manual_seed(17)
    whole = torch.randint(-128, 129, x.shape, generator=generator, device=x.device)
    return whole.to(x.dtype) / 64


@contextlib.contextmanager
def _undisturbed(owned: Sequence[Tensor]) -> Iterator[None]:
    """Whatever a run may leave behind, put back."""
    before = [x.detach().clone() for x in owned]
    grad = torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would keep the copies of weights
    # A checkpoint around the compiled call counts what is saved: only our own hooks see these.
    hooks = torch.autograd.graph.saved_tensors_hooks(_detached, _itself)
    try:
        # The random number generators of the CPU and of the GPUs.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices), hooks, without_compiled_autograd():
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        torch.set_grad_enabled(grad)
        put_back(list(zip(owned, before, strict=True)))


def put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give each tensor its value from before, where it has changed; autograd may have saved it."""
    with torch.no_grad():
        for x, value in before:
            if not _same(x, value):
                x.copy_(value)


def _detached(x: Tensor) -> Tensor:
    return x.detach()


def _itself(x: Tensor) -> Tensor:
    return x
