"""Time the launch configurations of one kernel after the other: `python benchmarks/sweep.py 64:bf16
128:bf16`.

The table of kernels/heuristics.py comes from its output: for each kernel the best configurations,
with registers, spills, shared memory, and the share of the copy bandwidth measured in the same run.
All configurations are compiled first, by one process a core, on small tensors of the same strides'
divisibility; then one process times them on 4 GiB of traffic or less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics as stats
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from bla_inductor.kernels import (
    heuristics,
    launch_forward,
    launch_key_pass,
    launch_query_pass,
    launching,
)
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.kernels.launching import Map, Numbers, feature_map

from bla_inductor.bench.measure import bandwidth as copy_bandwidth

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEURISTIC = {
    "state": "state_tile",
    "output": "output_tile",
    "query": "query_pass_tile",
    "key": "key_pass_tile",
}
RESIDENT = (1, 2, 3, 4, 6, 8, 16)

ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"


@dataclass(frozen=True)
class Job:
    """One kernel of one shape with one configuration."""

    kernel: str
    D: int
    dtype: str
    tile: Tile


def candidates(kernel: str, D: int, dtype: str) -> Iterator[Tile]:
    """The configurations that are tried."""
    d = heuristics.block(D)
    warps = (4, 8) if d <= 64 else (8,)
    if d <= 32:
        rows: tuple[int, ...] = (64, 128, 256)
    elif d <= 64:
        rows = (32, 64, 128, 256)
    else:
        rows = (32, 64, 128)
    for n, w, s in itertools.product(rows, warps, (2, 3, 4)):
        if n * d * s <= 128 * 64 * 4 and n * d <= 64 * 64 * w:
            yield Tile(n, d, d, d, w, s)


def inputs(D: int, dtype: str, B: int, H: int, T: int) -> dict[str, torch.Tensor]:
    """Tensors of one call, as views of (B, T, H, D) memory."""
    torch.manual_seed(0)
    make = lambda: (  # noqa: E731
        torch.randn(B, T, H, D, device="cuda").to(DTYPES[dtype]).transpose(1, 2)
    )
    return {
        **{name: make() for name in ("q", "k", "v", "do", "out", "dq", "dk", "dv")},
        "state": torch.rand(B, H, D, D, device="cuda"),
        "key_sum": torch.rand(B, H, D, device="cuda") + 1,
    }


def call(kernel: str, t: dict[str, torch.Tensor], precision: str) -> Callable[[], object]:
    """The launches of one kernel (with the sum of its splits)."""
    numbers = Numbers("add", 1.0, 1.0, 1e-6)
    phi, none = feature_map(ELU1, t["q"].dtype), Map()
    batch = t["q"].shape[:2]
    if kernel == "state":
        return lambda: launch_forward.statistics(
            t["k"], t["v"], None, batch, True, precision, (phi, none)
        )
    if kernel == "output":
        return lambda: launch_forward.apply_state(
            t["out"], t["q"], None, t["state"], t["key_sum"], None, numbers, precision, (phi, none)
        )
    if kernel == "query":
        return lambda: launch_query_pass.query_pass(
            t["dq"], None, t["do"], t["q"], None, t["state"], t["key_sum"], numbers, precision,
            launch_query_pass.Needs(True, True), (phi, none),
        )  # fmt: skip
    return lambda: launch_key_pass.key_pass(
        t["dk"], t["dv"], None, None, t["k"], t["v"], None, None, t["state"], t["key_sum"],
        precision, (phi, none),
    )  # fmt: skip


def prepare(job: Job) -> tuple[int, int, int] | str:
    """Compile and run once on small tensors: (registers, spills, shared) or the error."""
    try:
        usage: list[tuple[int, int, int]] = []
        original = launching.run
        use(job)

        def run(*args: Any, **constants: Any) -> Any:
            done = original(*args, **constants)
            usage.append((done.n_regs, done.n_spills, done.metadata.shared))

        launching.run = run
        try:
            call(job.kernel, inputs(job.D, job.dtype, 2, 4, 2048), precision_of(job.dtype))()
            torch.cuda.synchronize()
        finally:
            launching.run = original
        return usage[0]
    except Exception as error:  # reported in the table
        return f"{type(error).__name__}: {str(error)[:80]}"


def precision_of(dtype: str) -> str:
    return "ieee" if dtype == "fp32" else "native"


def use(job: Job) -> None:
    """Make the heuristics answer with the job's tile."""
    setattr(heuristics, HEURISTIC[job.kernel], lambda *_: job.tile)
    if job.D <= 64:
        heuristics.fused_query_pass = lambda *_: True  # type: ignore[assignment]


def graph_ms(f: Callable[[], object], inside: int = 4, replays: int = 5) -> float:
    """Median time of f on the device, from replays of a graph that holds it several times: Python
    takes longer to launch than the kernels to run.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(inside):
                f()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inside)
    return stats.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", nargs="+")
    parser.add_argument("--kernels", default="state,output,query,key")
    parser.add_argument("--show", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=0)
    options = parser.parse_args()
    jobs = [
        Job(kernel, int(D), dtype, tile)
        for D, dtype in (point.split(":") for point in options.points)
        for kernel in options.kernels.split(",")
        for tile in candidates(kernel, int(D), dtype)
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        prepared = list(pool.map(prepare, jobs))
    bandwidth = copy_bandwidth("cuda")
    print(f"# {torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.2f} TB/s, {len(jobs)} jobs")
    original = {name: getattr(heuristics, name) for name in HEURISTIC.values()}
    for (kernel, D, dtype), group in itertools.groupby(
        zip(jobs, prepared, strict=True), key=lambda x: (x[0].kernel, x[0].D, x[0].dtype)
    ):
        T = options.tokens or 16384 * 64 // D
        tensors = inputs(D, dtype, 8, 16, T)
        for name, function in original.items():
            setattr(heuristics, name, function)
        f = call(kernel, tensors, precision_of(dtype))
        units = {"state": 2, "output": 2, "query": 3, "key": 4}[kernel]
        floor = units * tensors["q"].nbytes / bandwidth
        results = []
        for job, usage in group:
            if isinstance(usage, str):
                print("  failed", kernel, D, job.tile, usage)
                continue
            best = (float("inf"), 0)
            for resident in RESIDENT:
                use(replace(job, tile=replace(job.tile, resident=resident)))
                best = min(best, (graph_ms(f), resident))
            results.append((*best, usage, job.tile))
        results.sort(key=lambda r: r[0])
        print(f"{kernel} D={D} {dtype} T={T}: floor {floor:.4f} ms")
        for ms, resident, usage, tile in results[: options.show]:
            print(
                f"  {ms:.4f} ms {100 * floor / ms:.0f} %  N={tile.BLOCK_N} warps={tile.num_warps} "
                f"stages={tile.num_stages} resident={resident}  "
                f"regs={usage[0]} spills={usage[1]} shared={usage[2]}",
                flush=True,
            )
        del tensors, f


if __name__ == "__main__":
    main()
