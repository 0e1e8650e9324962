"""What a small attention costs the host: `python benchmarks/host_overhead.py`.

Without CUDA graphs a small call is as slow as its launches. Per case the time of a call, in
microseconds, from a loop that never waits for the GPU within a batch of calls, and the GPU time of
its kernels from CUDA-graph replays. Columns:

    inductor   torch.compile of the naive formula
    call       bla with the operator as a call of the kernels' own launches
    lowered    bla with the operator as Inductor templates

for the forward alone and for forward and backward. Output: CSV.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config

from bla_inductor import lowering_cuda
from bla_inductor.templates import Unsupported

CASES = [(2, 4, 128), (2, 4, 512), (2, 8, 1024), (2, 16, 1024), (2, 16, 4096)]
D = 64


def naive(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
    return out.transpose(1, 2).flatten(2) + x


def _refuse(*args: object, **kwargs: object) -> None:
    raise Unsupported("calls are measured")


def compiled(name: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    options = {"rewrite": "always"} if name != "inductor" else None
    backend = "inductor" if name == "inductor" else "bla"
    return torch.compile(naive, backend=backend, options=options, fullgraph=True, dynamic=False)


def host_microseconds(function: Callable[[], object], calls: int = 50) -> float:
    """The median over batches of calls of the time that the host takes to issue one; a batch is
    short enough for the queue of launches, which holds about a thousand.
    """
    times = []
    for _ in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times)


def device_microseconds(function: Callable[[], object]) -> float:
    """The median of CUDA-graph replays, warm."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(20):
                function()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 20)
    return 1e3 * statistics.median(times)


def measured(b: int, h: int, n: int, dtype: torch.dtype, name: str) -> list[float]:
    """(host, GPU) of the forward, then of forward and backward."""
    q, k, v = (torch.randn(b, h, n, D, device="cuda").to(dtype) for _ in range(3))
    x = torch.randn(b, n, h * D, device="cuda").to(dtype)
    patch = mock.patch.dict(
        lowering_cuda._BUILD, dict.fromkeys(lowering_cuda._BUILD, _refuse) if name == "call" else {}
    )
    with patch, config.patch(force_disable_caches=True):
        lowering_cuda._reported.clear()
        run = compiled(name)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        do = torch.randn_like(x)

        def forward() -> Tensor:
            with torch.no_grad():
                return run(q, k, v, x)

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(run(*leaves, x), leaves, do)

        result = []
        for function in (forward, step):
            function()
            result += [host_microseconds(function), device_microseconds(function)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    dtype = getattr(torch, parser.parse_args().dtype)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, D={D}, us a call")
    print("B,H,N,provider,forward host,forward gpu,step host,step gpu")
    for b, h, n in CASES:
        for name in ("inductor", "call", "lowered"):
            row = ",".join(f"{t:.1f}" for t in measured(b, h, n, dtype, name))
            print(f"{b},{h},{n},{name},{row}", flush=True)


if __name__ == "__main__":
    main()
