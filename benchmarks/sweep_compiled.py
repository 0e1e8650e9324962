"""Time tiles as compiled graphs use them: `python benchmarks/sweep_compiled.py 64:fp32:high
80:bf16`.

In a template strides are numbers in the kernel's text, so that other tiles are best than where the
operator is called. Every candidate is a graph of its own, forward and backward, with one
tile for each of the four kernels; the profiler tells the kernels' times apart. Processes compile
side by side, wait for each other, and then time one after the other, so that nothing else runs on
the GPU. Large tensors only: candidates take the place of what large.py says.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

KERNELS = {"state": 2, "output": 2, "query": 3, "key": 4}  # and the q-sized tensors that each moves
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LAYOUTS = {"tokens": (0, 2, 1, 3), "heads": (0, 1, 2, 3)}  # (B, N, H, D) memory, or (B, H, N, D)
RUNS = 12


def candidates(kernel: str, D: int, itemsize: int, count: int) -> list[tuple[Any, ...] | None]:
    """`count` tiles as `Tile` takes them, the table's own (None) first, then at random."""
    d = max(16, 1 << (D - 1).bit_length())
    found: list[tuple[Any, ...]] = []
    grid = itertools.product((16, 32, 64, 128, 256), (2, 4, 8), (2, 3, 4), (1, 2, 3, 4), (0, 1))
    for rows, warps, stages, resident, tma in grid:
        shared = stages * rows * (D if tma else d) * itemsize * (1 if kernel == "output" else 2)
        values = rows * d // (32 * warps)  # of a tile, in each thread
        held = kernel in ("query", "key")  # accumulators beside the tile
        if not 8 <= values <= (64 if held else 128) or resident * (shared + 2048) > 220_000:
            continue
        if (
            resident * warps > 16
            or (warps == 2 and d > 32)
            or (tma and (D < 40 or kernel == "key"))
        ):
            continue
        found.append((rows, d, d, d, warps, stages, resident, 0, bool(tma)))
        if itemsize == 2 and 64 < D <= 96 and held and not tma:
            rest = max(16, 1 << (D - 65).bit_length())
            found.append((rows, 64, 64, 64, warps, stages, resident, rest, False))
    random.Random(D).shuffle(found)
    return [None, *found[: count - 1]]


def naive(q: Any, k: Any, v: Any) -> Any:
    import torch.nn.functional as F

    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


def compiled(point: str, picks: dict[str, Any], T: int, layout: str) -> Callable[[], object]:
    """A forward and backward with these tiles, compiled and run once."""
    import torch
    from bla_inductor.kernels.heuristics import Tile

    from bla_inductor.templates import arguments

    D, dtype, *precision = point.split(":")
    torch.set_float32_matmul_precision(precision[0] if precision else "highest")
    own = arguments.for_large

    def for_large(kernel: str, tile: Tile, *rest: Any) -> Tile:
        return Tile(*picks[kernel]) if picks.get(kernel) else own(kernel, tile, *rest)

    def make() -> torch.Tensor:
        order = LAYOUTS[layout]
        shape = [(8, 16, T, int(D))[d] for d in order]
        x = torch.randn(shape, device="cuda", dtype=getattr(torch, DTYPES[dtype]))
        return x.permute([order.index(d) for d in range(4)]).requires_grad_()

    torch._dynamo.reset()
    f = torch.compile(naive, backend="bla")
    q, k, v, do = make(), make(), make(), make().detach()
    arguments.for_large = for_large
    try:
        torch.autograd.grad(f(q, k, v), (q, k, v), do)
    finally:
        arguments.for_large = own
    torch.cuda.synchronize()
    return lambda: torch.autograd.grad(f(q, k, v), (q, k, v), do)


def microseconds(step: Callable[[], object]) -> dict[str, float]:
    """Of each kernel, the lower quartile of several runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(RUNS):
            step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if "triton_tem" in event.name:
            times.setdefault(event.name, []).append(event.device_time)
    result = {}
    for run, (first, last) in {
        "forward": ("state", "output"),
        "backward": ("query", "key"),
    }.items():
        # numbered in the order in which they run; between them is the sum of the splits
        names = sorted((n for n in times if run in n), key=lambda n: int(n.rpartition("_")[2]))
        for kernel, name in ((first, names[0]), (last, names[-1])):
            result[kernel] = sorted(times[name])[RUNS // 4]
    return result


def timed(step: Callable[[], object]) -> dict[str, float] | str:
    try:
        return microseconds(step)
    except Exception as error:  # the others wait for this process
        return f"{type(error).__name__}: {str(error)[:80]}"


def work(jobs: Sequence[Any], options: Any, barrier: Any, lock: Any, results: Any) -> None:
    """Round by round: compile one's job, wait for the others', time in turn."""
    for job in jobs:
        step, why = None, ""
        if job is not None:
            try:
                step = compiled(job[0], job[1], options.tokens, options.layout)
            except Exception as error:  # a tile that does not fit is told, the others go on
                why = f"{type(error).__name__}: {str(error)[:80]}"
        barrier.wait()
        with lock:
            if job is not None:
                results.put((*job, timed(step) if step is not None else why))
        step = None
        barrier.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", nargs="+", help="D:dtype or D:fp32:matmul precision")
    parser.add_argument("--count", type=int, default=24, help="candidates for each kernel")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layout", choices=LAYOUTS, default="tokens")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--show", type=int, default=5)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # tiles are not in the cache's key
    jobs: list[Any] = []
    for point in options.points:
        D, dtype, *_ = point.split(":")
        itemsize = 4 if dtype == "fp32" else 2
        lists = {k: candidates(k, int(D), itemsize, options.count) for k in KERNELS}
        longest = max(map(len, lists.values()))
        picks = [{k: c[i] for k, c in lists.items() if i < len(c)} for i in range(longest)]
        jobs += [(point, pick) for pick in picks]
    rounds = -(-len(jobs) // options.processes)
    jobs += [None] * (rounds * options.processes - len(jobs))
    context = multiprocessing.get_context("spawn")
    barrier, lock, results = context.Barrier(options.processes), context.Lock(), context.Queue()
    workers = [
        context.Process(
            target=work, args=(jobs[i :: options.processes], options, barrier, lock, results)
        )
        for i in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for job in jobs if job is not None]
    for worker in workers:
        worker.join()
    tell(found, options)


def tell(found: Sequence[Any], options: Any) -> None:
    """The best tiles of each kernel, with the share of the copy bandwidth measured here."""
    import torch

    from bla_inductor.bench.measure import bandwidth

    copy = bandwidth("cuda")
    print(f"# {torch.cuda.get_device_name()}, copy {copy / 1e9:.2f} TB/s, {len(found)} graphs")
    for point, picks, why in found:
        if isinstance(why, str):
            print(f"failed {point} {picks}: {why}")
    for point in options.points:
        D, dtype, *_ = point.split(":")
        size = 8 * 16 * options.tokens * int(D) * (4 if dtype == "fp32" else 2)
        print(f"{point} T={options.tokens}, {options.layout}; (rows, warps, stages, …)")
        for kernel, units in KERNELS.items():
            ranked = [
                (took[kernel], picks[kernel])
                for at, picks, took in found
                if at == point and kernel in picks and not isinstance(took, str)
            ]
            for took, pick in sorted(ranked, key=lambda x: x[0])[: options.show]:
                share = 100 * units * size / copy / (took * 1e-3)
                tile = "the table's" if pick is None else (pick[0], *pick[4:])
                print(f"  {kernel:7} {took:8.1f} µs {share:4.0f} %  {tile}", flush=True)


if __name__ == "__main__":
    main()
