"""Times, peak memory and errors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bla_inductor.bench.cases import Case
from bla_inductor.bench.providers import Attention, naive

__all__ = [
    "Inputs",
    "bandwidth",
    "called",
    "enough_inputs",
    "error",
    "inaccuracy",
    "make_inputs",
    "milliseconds",
    "peak_bytes",
]

# Times the error of the naive graph itself. In fp32 the order of summation alone moves either error
# by tens of percent; a 16-bit result is rounded once, after sums that are exact in comparison.
_FACTOR = {torch.float32: 1.5}
_ROUNDINGS = 8.0  # the floor of what is allowed, in units of the dtype's eps
_CHECKED_HEADS = 2


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.qkv]


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Normally distributed, of the layout that the case asks for."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    if case.packed:
        q, k, v = draw(case.B, case.N, 3, case.H, case.D).permute(2, 0, 3, 1, 4)
        # As the result lies: AOTAutograd copies a gradient that comes in another layout.
        return Inputs(q, k, v, draw(case.B, case.H, case.N, case.D))
    return Inputs(
        draw(case.B, case.H, case.N, case.D),
        draw(case.B, case.H, case.keys, case.D),
        draw(case.B, case.H, case.keys, case.channels),
        draw(case.B, case.H, case.N, case.channels),
    )


def enough_inputs(case: Case, device: str) -> list[Inputs]:
    """Inputs of as many calls as make the start of a graph small beside them, and that no cache
    holds: 1 GiB in all, from 1 to 64.
    """
    first = make_inputs(case, device)
    if device == "cpu" or case.memory:
        return [first]
    size = sum(x.nbytes for x in (*first.qkv, first.do))
    count = max(1, min(64, 2**30 // size))
    return [first, *(make_inputs(case, device, seed) for seed in range(1, count))]


def milliseconds(
    functions: Callable[[], object] | Sequence[Callable[[], object]], device: str
) -> float:
    """The median over many runs; on a GPU of CUDA-graph replays, each with a cold L2 cache.

    Several functions are calls of one on inputs of their own: they follow each other in one graph,
    as calls do in a model, and the time is that of one. A single short call would be measured with
    the start of the graph, 4–5 µs on an H100.
    """
    calls = [functions] if callable(functions) else list(functions)
    if device == "cpu":
        return _on_cpu(calls[0])
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # Kept, so that no call writes where another wrote, into lines still in the cache.
            results = [call() for call in calls]
    torch.cuda.synchronize()
    ms = do_bench(graph.replay, warmup=20, rep=100, return_mode="median")
    del results
    return float(ms) / len(calls)


def called(function: Callable[[], object], device: str) -> float:
    """The median over many calls from Python, in ms, each with a cold L2 cache on a GPU."""
    if device == "cpu":
        return _on_cpu(function)
    from triton.testing import do_bench

    for _ in range(3):
        function()
    return float(do_bench(function, warmup=20, rep=100, return_mode="median"))


def _on_cpu(function: Callable[[], object]) -> float:
    function()
    times: list[float] = []
    end = time.perf_counter() + 0.1
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def bandwidth(device: str) -> float:
    """Bytes read plus bytes written in a millisecond, by a kernel that copies a large tensor.

    Not `copy_`: captured in a graph it is left to the driver, which took a quarter longer (H100).
    """
    source = torch.randn(2**28 if device != "cpu" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: torch.neg(source, out=target), device)


def peak_bytes(function: Attention, inputs: Inputs) -> int:
    """Memory that a training step takes beyond its inputs: forward, then backward."""
    leaves = inputs.leaves
    for _ in range(2):
        torch.autograd.grad(function(*leaves), leaves, inputs.do)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(function(*leaves), leaves, inputs.do)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def inaccuracy(function: Attention, case: Case, inputs: Inputs) -> float:
    """The worst error against fp64, of the result and each gradient, over what is allowed.

    Allowed is the error of the naive graph times 1.1, at least a few roundings: above 1 is wrong.
    Heads are independent, so fp64 sees the first few.
    """
    few = (slice(0, 1), slice(0, _CHECKED_HEADS))
    reference = naive(case)
    exact_leaves = [x[few].double().detach().requires_grad_() for x in inputs.leaves]
    do = inputs.do[few]
    exact = _results(reference, exact_leaves, do.double())
    few_leaves = [x[few].detach().requires_grad_() for x in inputs.leaves]
    theirs = _results(reference, few_leaves, do)
    ours = [x[few] for x in _results(function, inputs.leaves, inputs.do)]
    factor = _FACTOR.get(case.dtype, 1.1)
    floor = _ROUNDINGS * torch.finfo(case.dtype).eps
    worst = 0.0
    for got, eager, truth in zip(ours, theirs, exact, strict=True):
        allowed = max(factor * error(eager, truth), floor)
        worst = max(worst, error(got, truth) / allowed)
    return worst


def _results(function: Attention, leaves: list[Tensor], do: Tensor) -> list[Tensor]:
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def error(got: Tensor, exact: Tensor) -> float:
    ratio = ((got.double() - exact).norm() / exact.norm()).item()
    return ratio if ratio == ratio else float("inf")
