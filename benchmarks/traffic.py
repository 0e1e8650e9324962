"""One forward and backward of the operator for each case, for tools that watch the GPU:

    compute-sanitizer --tool memcheck python benchmarks/traffic.py --tokens 100 2100 --dim 64 80
    compute-sanitizer --tool racecheck python benchmarks/traffic.py --tokens 100 2100 --dim 64 80
    ncu --clock-control none --metrics dram__bytes_read.sum,dram__bytes_write.sum --csv \
        -k "regex:state|output|query_pass|key_pass" \
        python benchmarks/traffic.py --batch 8 --heads 16 --tokens 16384 32768 --dtype bfloat16

B × H heads of N tokens and D features, φ = elu + 1 inside, with a normaliser.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F

import bla_inductor.ops  # noqa: F401  (registers the operator)

PHI = "Piecewise((x + 1, x > 0), (exp(x), True))"


def step(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> float:
    """Run it; the largest error of the result and the gradients over eager's in fp32, as norms."""
    q, k, v, do = (
        torch.randn(batch, heads, tokens, dim, device="cuda", dtype=dtype) for _ in range(4)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = torch.ops.bla.linear_attention(*inputs, q_map=PHI, k_map=PHI, normalizer="add", eps=1e-6)
    found = out, *torch.autograd.grad(out, inputs, do)
    if batch * heads * tokens > 1 << 20:
        return 0.0  # of such sizes only the traffic is of interest
    wide = [t.detach().double().requires_grad_() for t in inputs]
    mapped = [F.elu(t) + 1 for t in wide[:2]]
    z = mapped[0] @ mapped[1].sum(-2).unsqueeze(-1) + 1e-6
    true = mapped[0] @ (mapped[1].mT @ wide[2]) / z
    true_grads = torch.autograd.grad(true, wide, do.double())
    pairs = zip(found, (true, *true_grads), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 2100])
    parser.add_argument("--dim", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.manual_seed(0)
    for tokens, dim, dtype in itertools.product(args.tokens, args.dim, args.dtype):
        error = step(args.batch, args.heads, tokens, dim, getattr(torch, dtype))
        torch.cuda.synchronize()
        print(f"N = {tokens}, D = {dim}, {dtype}: error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
