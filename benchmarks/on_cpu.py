"""The zoo's blocks, and quadratic spellings, on a CPU: `python benchmarks/on_cpu.py [NAME…]`.

fp32, B4 N784 C64 H2; quadratic: B1 H4 at N × D. Per case the time of a call in milliseconds under
Inductor and under bla, and Inductor's over ours, for inference and, of the blocks, a training step.

Every backend has a process of its own, since what ran before changes what follows by tens of
percent, convolutions' backward most; two processes take turns of a few calls, so that another load
of the machine meets both alike. Of each pair of turns comes a ratio, of each pair of processes the
median of its ratios, and of all pairs the median, beside the least and the largest. Output: CSV.

Freed memory stays with the process (_KEEP), as under the allocators that servers preload. Under
glibc's own settings it depends on which buffer happens to be the last of the heap whether its pages
go back to the kernel after every call, and that moves a step by 5 to 10 percent either way; with
--glibc as the first argument these are measured.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bla_inductor.bench.model_cases import AttentionBlock

IMAGE, TOKENS = (4, 28, 28, 64), (4, 784, 64)
BLOCKS = {
    "attention block": ("", "", (64, 2), TOKENS),
    "MLLA block": ("mlla", "MLLABlock", (64, 2), IMAGE),
    "FLatten attention": ("focused_la", "FocusedLinearAttention", (64, (28, 28), 2), TOKENS),
    "PolaFormer attention": ("polaformer", "PolaLinearAttention", (64, (28, 28), 2), TOKENS),
    "RALA attention": ("rala", "RankAugmentedLinearAttention", (64, 2), (4, 64, 28, 28)),
    "VSSD mixer": ("vssd", "NonCausalSSD", (64,), IMAGE),
}
QUADRATIC = {f"quadratic {n}x{d}": (n, d) for n, d in ((1024, 32), (1024, 64), (4096, 64))}
PAIRS, TURNS, CALLS = 5, 20, 4
_KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.relu(q) @ F.relu(k).mT
    return (scores / (scores.sum(-1, keepdim=True) + 1e-6)) @ v


def runs(name: str, backend: str) -> dict[str, Callable[[], object]]:
    """What is timed of a case, by kind of run."""
    torch.manual_seed(0)
    if name in QUADRATIC:
        n, d = QUADRATIC[name]
        tensors = [torch.randn(1, 4, n, d) for _ in range(3)]
        run = torch.compile(quadratic, backend=backend, dynamic=False)
        return {"inference": torch.no_grad()(lambda: run(*tensors))}
    module, kind, arguments, shape = BLOCKS[name]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    make: Callable[..., nn.Module] = AttentionBlock
    if module:
        make = getattr(importlib.import_module(f"zoo.{module}"), kind)
    model, x = make(*arguments), torch.randn(shape)
    parameters = list(model.parameters())
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def training() -> object:
        out = compiled(x)
        return torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

    return {"inference": torch.no_grad()(lambda: compiled(x)), "training step": training}


def work(name: str, backend: str) -> None:
    """Per line of stdin, the name of a run, one turn: the median of its calls in milliseconds."""
    calls = runs(name, backend)
    for call in calls.values():
        for _ in range(3):
            call()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        call, times = calls[line.strip()], []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(1e3 * statistics.median(times)), flush=True)


class Worker:
    """A process that runs one case under one backend."""

    def __init__(self, name: str, backend: str) -> None:
        command = [sys.executable, __file__, "--work", name, backend]
        pipe = subprocess.PIPE
        environment = os.environ if "--glibc" in sys.argv else {**os.environ, **_KEEP}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.runs: list[str] = self._answer()

    def turn(self, run: str) -> float:
        assert self._process.stdin
        print(run, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(("[", *"0123456789")):
                return json.loads(line)
        raise RuntimeError("a worker ended; its error is above")


def pair(name: str) -> dict[str, tuple[float, float, float]]:
    """(Inductor's milliseconds, ours, the ratio) by kind of run, in two new processes."""
    theirs, ours = Worker(name, "inductor"), Worker(name, "bla")
    found = {}
    for run in ours.runs:
        turns = [(theirs.turn(run), ours.turn(run)) for _ in range(TURNS)]
        ratio = statistics.median(a / b for a, b in turns)
        found[run] = (*(statistics.median(of) for of in zip(*turns, strict=True)), ratio)
    theirs.close()
    ours.close()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
        return
    print(f"# CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("case,run,inductor_ms,bla_ms,inductor_ratio,least,largest", flush=True)
    names = [name for name in sys.argv[1:] if name != "--glibc"]
    for name in names or [*BLOCKS, *QUADRATIC]:
        pairs = [pair(name) for _ in range(PAIRS)]
        for run in pairs[0]:
            theirs, ours, ratios = zip(*(found[run] for found in pairs), strict=True)
            columns = (statistics.median(theirs), statistics.median(ours))
            columns += (statistics.median(ratios), min(ratios), max(ratios))
            print(name, run, *(f"{x:.2f}" for x in columns), sep=",", flush=True)


if __name__ == "__main__":
    main()
