"""The suite `models`: whole blocks and models, inference and training step, GPU time.

Times are CUDA-graph replays of everything, parameters' gradients included, because small steps are
bound by the host otherwise. The models are in `model_cases`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache

from bla_inductor.bench import measure
from bla_inductor.bench.cases import Case
from bla_inductor.bench.model_cases import MODELS, Model
from bla_inductor.bench.output import Row
from bla_inductor.bench.providers import naive

__all__ = ["run"]

_FACTOR, _ROUNDINGS = 1.1, 8.0
# A gradient of few numbers is luck in either direction, so by itself it has only to be right.
_RIGHT, _NEGLIGIBLE = 0.1, 1e-6
_WARM_UP = Case("warm-up", 1, 2, 256, 32)


def run(
    providers: Sequence[str], device: str, lengths: set[int], only: str, fresh: bool = False
) -> Iterator[Row]:
    """Rows for the models whose name contains `only` and whose N is in `lengths` (all if empty).

    fresh: every compilation starts with empty caches, and its time is told; it takes minutes.
    """
    if fresh:  # a process's first compilation pays for imports and starts the compile workers
        for name in ("inductor", "bla"):
            torch.compile(naive(_WARM_UP), backend=name)(*measure.make_inputs(_WARM_UP, device).qkv)
    for model in MODELS:
        if (lengths and model.N not in lengths) or only.lower() not in model.name.lower():
            continue
        yield from _model(
            model, [p for p in providers if p in ("torch", "inductor", "bla")], device, fresh
        )


def _model(model: Model, providers: Sequence[str], device: str, fresh: bool) -> Iterator[Row]:
    kind = str(model.dtype).removeprefix("torch.")
    blank = Row(model.name, f"N{model.N}", model.N, kind, "", "", "")
    torch.manual_seed(0)
    try:
        module, inputs, kwargs = model.make()
    except ModuleNotFoundError as missing:
        yield replace(blank, note=f"pip install {missing.name}: its package is not installed")
        return
    module = module.to(device, model.dtype)
    inputs = tuple(x.to(device, model.dtype) for x in inputs)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    start_state = copy.deepcopy(module.state_dict())  # a training step moves running statistics
    truth = _results(copy.deepcopy(module).double(), [x.double() for x in inputs], kwargs)
    references = [_results(module, inputs, kwargs)]
    inductor: dict[str, float] = {}
    for name in providers:
        torch._dynamo.reset()
        module.load_state_dict(start_state)
        ours = module if name == "torch" else torch.compile(module, backend=name, dynamic=False)
        with fresh_inductor_cache() if fresh and name != "torch" else nullcontext():
            start = time.perf_counter()
            results = _results(ours, inputs, kwargs)
            if device != "cpu":
                torch.cuda.synchronize()
            compiling = time.perf_counter() - start
        wrong = _worst(results, references, truth, model.dtype)
        row = replace(blank, provider=name, inaccuracy=wrong)
        if name == "inductor":
            references.append(results)
        elif not wrong <= 1:
            yield replace(row, run="training step", note=f"WRONG: {wrong:.2f}, not timed")
            continue
        for run_name, step in _steps(ours, module, inputs, kwargs).items():
            ms = measure.milliseconds(step, device)
            if name == "inductor":
                inductor[run_name] = ms
            made = replace(row, run=run_name, ms=ms)
            if run_name in inductor:
                made.inductor_ratio = inductor[run_name] / ms
            if fresh and name != "torch" and run_name == "training step":
                made.note = f"compiled in {compiling:.1f} s"
            yield made


def _steps(
    ours: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor], kwargs: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def inference() -> object:
        module.eval()
        with torch.no_grad():
            return ours(*inputs, **kwargs)

    with torch.no_grad():
        incoming = torch.randn_like(_tensor(module(*inputs, **kwargs)))

    def training() -> object:
        module.train()
        out = _tensor(ours(*inputs, **kwargs))
        return torch.autograd.grad(out, parameters, incoming, allow_unused=True)

    return {"inference": inference, "training step": training}


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[-1]


def _results(
    function: Callable[..., Any], inputs: Sequence[Tensor], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The output in inference, in training, the gradients of all parameters as one vector, and each
    by itself.
    """
    module: Any = getattr(function, "_orig_mod", function)
    module.eval()
    with torch.no_grad():
        inferred = _tensor(function(*inputs, **kwargs))
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    out = _tensor(function(*inputs, **kwargs))
    generator = torch.Generator(out.device).manual_seed(1)
    incoming = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, parameters, incoming, allow_unused=True)
    given = [g.flatten() for g in grads if g is not None]
    return [inferred, out.detach(), torch.cat(given), *given]


def _worst(
    ours: Sequence[Tensor],
    references: Sequence[Sequence[Tensor]],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> float:
    """The largest error over what is allowed: that of eager mode, or of Inductor where it has been
    measured, times 1.1, at least a few roundings.
    """
    floor = _ROUNDINGS * torch.finfo(dtype).eps
    least = _NEGLIGIBLE * truth[2].norm().item()  # gradients that are zero but for rounding

    def ratio(i: int, floor: float, factor: float) -> float:
        errors = (measure.error(r[i], truth[i]) for r in references)
        return measure.error(ours[i], truth[i]) / max(floor, *(factor * e for e in errors))

    whole = [ratio(i, floor, _FACTOR) for i in range(3)]
    each = [i for i in range(3, len(truth)) if truth[i].norm() > least]
    return max(whole + [ratio(i, _RIGHT, 1 / _RIGHT) for i in each])
