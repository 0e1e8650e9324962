"""`bench my_model.py:example`: your model in eager mode, under Inductor and under bla.

Before a time is told, `verify` compares what bla makes of the model with fp64, in inference and in
training. Times are those of calls from Python, without CUDA graphs, as a program sees them, and the
providers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bla_inductor.bench import measure
from bla_inductor.bench.output import Row
from bla_inductor.example import Example
from bla_inductor.explainer import explain, original
from bla_inductor.verifier import verify

__all__ = ["OwnModel"]

_TURNS = 11


class OwnModel:
    """One call of the user's model, where its tensors are; `name` is for the table."""

    def __init__(self, name: str, example: Example) -> None:
        self.name, self.model = name, original(example.model)
        leaves, spec = pytree.tree_flatten((tuple(example.args), dict(example.kwargs)))
        weights = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        self.wanted = [x for x in (*weights, *inputs) if x.requires_grad]
        if not weights and not self.wanted:  # a function: of what else would its gradients be?
            copies = {id(x): x.detach().requires_grad_() for x in inputs}
            leaves = [copies.get(id(x), x) for x in leaves]
            self.wanted = list(copies.values())
        self.call: tuple[Sequence[Any], Mapping[str, Any]] = pytree.tree_unflatten(leaves, spec)
        tensors = [x for x in (*weights, *leaves) if isinstance(x, Tensor)]
        self.device = tensors[0].device.type if tensors else "cpu"
        dtypes = [x.dtype for x in tensors if x.is_floating_point()]
        self.dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else ""

    def rows(self, providers: Sequence[str]) -> Iterator[Row]:
        """A row for each run and provider; one with a note where a result is wrong."""
        for run in ("inference", "training step") if self.wanted else ("inference",):
            with self._mode(run):
                yield from self._rows(
                    run, [p for p in ("torch", "inductor", "bla") if p in providers]
                )

    def _rows(self, run: str, providers: Sequence[str]) -> Iterator[Row]:
        args, kwargs = self.call
        blank = Row(self.name, "", 0, self.dtype, "", run, "")
        torch._dynamo.reset()
        steps = {name: self._step(run, name) for name in providers}
        if "bla" in steps:
            print(f"{run}: {explain(self.model, *args, **kwargs).summary()}")
            found = verify(self.model, *args, **kwargs)
            if not found.ok:
                del steps["bla"]
                yield replace(blank, provider="bla", note=f"WRONG: {found.summary()}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(_TURNS):  # so that what else the machine does meets all of them
            for name, step in steps.items():
                times[name].append(measure.called(step, self.device))
        inductor = median(times["inductor"]) if "inductor" in times else None
        for name, own in times.items():
            ms = median(own)
            yield replace(blank, provider=name, ms=ms, inductor_ratio=inductor and inductor / ms)

    def _step(self, run: str, provider: str) -> Callable[[], object]:
        """What is timed, compiled by its first call."""
        args, kwargs = self.call
        model: Any = self.model
        if provider != "torch":
            model = torch.compile(model, backend=provider)
        if run == "inference":
            return lambda: model(*args, **kwargs)

        def training() -> object:
            outs = pytree.tree_leaves(model(*args, **kwargs))
            outs = [x for x in outs if isinstance(x, Tensor) and x.requires_grad]
            ones = [torch.ones_like(x) for x in outs]
            return torch.autograd.grad(outs, self.wanted, ones, allow_unused=True)

        return training

    @contextmanager
    def _mode(self, run: str) -> Iterator[None]:
        """Gradients and the training flag as `run` has them."""
        modules = list(self.model.modules()) if isinstance(self.model, nn.Module) else []
        before = [module.training for module in modules]
        for module in modules[:1]:
            module.train(run != "inference")
        try:
            with torch.set_grad_enabled(run != "inference"):
                yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training
