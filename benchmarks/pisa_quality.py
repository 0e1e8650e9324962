"""What piecewise sparse attention loses: relative error of its result against exact attention, by
density, beside block-sparse attention of the same selection (which drops the other blocks) and the
zeroth-order expansion (block means without the moment).

    python benchmarks/pisa_quality.py [--plot docs/pisa_quality.png]

Inputs, all with keys in the order in which diffusion transformers see tokens, neighbours next to
each other: `random`, independent normal numbers; `low rank`, smooth curves in four dimensions
mixed into all; `clustered`, runs of tokens around common centres; `concentrated`, the same with
twice the logits, so that nearly all weight is inside the selected blocks. Runs on the CPU in a
minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bla_inductor.ops  # noqa: F401  (registers the operator)
from bla_inductor.ops import piecewise_aten

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
Inputs = tuple[Tensor, Tensor, Tensor]


def random(tokens: int, dim: int) -> Inputs:
    q, k, v = torch.randn(3, 4, tokens, dim)
    return q, k, v


def low_rank(tokens: int, dim: int, rank: int = 4) -> Inputs:
    """Curves of a few periods, mixed into `dim` features; keys and queries share the curve."""
    at = torch.linspace(0, 1, tokens)[:, None]
    frequency = torch.rand(4, 1, rank) * 6 * torch.pi
    curve = (frequency * at + torch.rand(4, 1, rank) * 6).sin()
    mix = torch.randn(3, 4, rank, dim)
    q, k, v = (curve @ m for m in (mix[0], mix[0], mix[2]))
    noise = 0.1 * torch.randn(3, 4, tokens, dim)
    return q + noise[0], k + noise[1], v + noise[2]


def clustered(tokens: int, dim: int, spread: float = 0.7) -> Inputs:
    """Runs of 48 tokens about one of twelve centres, `spread` in size, of keys and queries."""
    run, centres = 48, 12
    which = torch.randint(centres, (4, -(-tokens // run))).repeat_interleave(run, 1)[:, :tokens]
    heads = torch.arange(4)[:, None]
    centre, value = torch.randn(2, 4, centres, dim)
    noise = torch.randn(3, 4, tokens, dim)
    q, k = (spread * centre[heads, which] + 0.4 * noise[i] for i in (0, 1))
    return q, k, value[heads, which] + 0.4 * noise[2]


INPUTS: dict[str, Callable[[int, int], Inputs]] = {
    "random": random,
    "low rank": low_rank,
    "clustered": clustered,
    "concentrated": lambda tokens, dim: clustered(tokens, dim, 1.0),
}


def errors(inputs: Inputs, density: float, block_size: int) -> dict[str, float]:
    """By method: ‖out - exact‖ / ‖exact‖, all of the same selection, in fp32."""
    q, k, v = inputs
    scale = q.shape[-1] ** -0.5
    chosen = piecewise_aten.select(q, k, density, block_size, scale)
    truth = F.scaled_dot_product_attention(q, k, v)
    first = torch.ops.bla.piecewise_sparse_attention(
        q, k, v, density=density, block_size=block_size
    )
    rows = chosen.repeat_interleave(block_size, -2)[..., : q.shape[-2], :]
    mask = rows.repeat_interleave(block_size, -1)[..., : k.shape[-2]]
    sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # A block as one key of logit s q·k̄ + ln len and of value v̄, with the selected keys beside it.
    lengths = piecewise_aten.block_lengths(k.shape[-2], block_size, k)
    k_means, v_means = (piecewise_aten.block_means(x, block_size) for x in (k, v))
    far = lengths.log().masked_fill(rows, -torch.inf)
    near = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    zeroth = F.scaled_dot_product_attention(
        q, torch.cat([k, k_means], -2), torch.cat([v, v_means], -2), torch.cat([near, far], -1)
    )
    methods = {"block-sparse": sparse, "zeroth order": zeroth, "first order": first}
    return {name: ((out - truth).norm() / truth.norm()).item() for name, out in methods.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    table: dict[str, list[dict[str, float]]] = {}
    print("inputs,density,block-sparse,zeroth order,first order")
    for name, make in INPUTS.items():
        torch.manual_seed(0)
        inputs = make(given.tokens, given.dim)
        table[name] = [errors(inputs, density, given.block_size) for density in DENSITIES]
        for density, row in zip(DENSITIES, table[name], strict=True):
            print(name, density, *(f"{x:.4f}" for x in row.values()), sep=",")
    if given.plot:
        title = f"{given.tokens} tokens, head dim {given.dim}, blocks of {given.block_size}"
        plot(given.plot, table, title)


def plot(path: Path, table: dict[str, list[dict[str, float]]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(table), figsize=(13, 3.4), layout="constrained")
    for axis, (name, rows) in zip(axes, table.items(), strict=True):
        for method in rows[0]:
            axis.plot(DENSITIES, [row[method] for row in rows], marker="o", label=method)
        axis.set(title=name, xlabel="density", ylabel="relative error", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
