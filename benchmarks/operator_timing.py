"""How the benchmarks of the operator measure: CUDA-graph replays, and the copy bandwidth beside
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.testing import do_bench

ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"


def replay_ms(f: Callable[[], object], rep: int = 60) -> float:
    """Median time of a CUDA-graph replay of f, with a cold L2."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            f()
    torch.cuda.synchronize()
    return float(do_bench(graph.replay, warmup=10, rep=rep, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes read plus written a millisecond, by a 1 GiB copy."""
    source = torch.randn(2**28, device="cuda")
    copied = torch.empty_like(source)
    time = do_bench(lambda: copied.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.nbytes / float(time)
