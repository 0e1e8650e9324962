"""The suite `pisa`: piecewise sparse attention against exact attention, forward, in one run.

    python -m bla_inductor bench pisa [--lengths 16384]

On a GPU the opponent is SDPA's flash kernel; `sdpa` is what SDPA takes by itself. The bound is
(density + 2/block_size) of the flash kernel's time, plus one read of q, k and v at the measured
copy bandwidth. Before a time is printed the result is compared with the formula in fp32 for the
same selection. `loss` is the relative error against exact attention of these inputs, which are
smooth along the sequence, as images are.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bla_inductor.ops  # noqa: F401  (registers the operator)
from bla_inductor.bench import measure, output
from bla_inductor.ops import piecewise, piecewise_aten

__all__ = ["run"]

LENGTHS = (4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3)
HEADS, BLOCK = 16, 64
_ROUNDINGS = 8.0  # what the result may be off, in units of the dtype's eps


@dataclass
class Row:
    """One density of one problem. speedup: flash over ms; of_bound: ms over bound."""

    T: int
    D: int
    density: float
    ms: float | None
    flash_ms: float
    sdpa_ms: float
    speedup: float | None = None
    bound_ms: float | None = None
    of_bound: float | None = None
    loss: float | None = None
    note: str = ""


def run(given: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    device = given.device
    lengths = [int(n) for n in given.lengths.split(",") if n] or LENGTHS
    copy = measure.bandwidth(device)
    header = output.machine(device, copy) | {"heads": str(HEADS), "block": str(BLOCK)}
    print("  ".join(f"{k}: {v}" for k, v in header.items()))
    print(*(f"{f.name:>9}" for f in fields(Row)))
    rows = []
    for row in _rows(lengths, device, copy):
        told = [f"{x:.4g}" if isinstance(x, float) else x for x in asdict(row).values()]
        print(*(f"{'' if x is None else x:>9}" for x in told), flush=True)
        rows.append(row)
    stem = given.out / f"pisa-{header['device'].split(' (')[0].replace(' ', '-')}"
    _write(stem.with_suffix(".csv"), rows, header)
    print(f"wrote {stem.with_suffix('.csv')}")
    if not given.no_plot:
        try:
            _plot(stem.with_suffix(".png"), rows, f"{header['device']}, torch {header['torch']}")
            print(f"wrote {stem.with_suffix('.png')}")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)")
    return int(any(row.note.startswith("WRONG") for row in rows))


def _rows(lengths: Sequence[int], device: str, copy: float) -> Iterator[Row]:
    for D in (64, 128):
        for T in lengths:
            q, k, v = _inputs(T, D, device)
            with torch.no_grad():
                flash = measure.milliseconds(lambda: _flash(q, k, v), device)  # noqa: B023
                sdpa = measure.milliseconds(
                    lambda: F.scaled_dot_product_attention(q, k, v),  # noqa: B023
                    device,
                )
                truth = _flash(q, k, v).float()
                for density in DENSITIES:
                    yield _row(T, D, density, (q, k, v), truth, flash, sdpa, device, copy)


def _row(
    T: int,
    D: int,
    density: float,
    inputs: tuple[Tensor, Tensor, Tensor],
    truth: Tensor,
    flash: float,
    sdpa: float,
    device: str,
    copy: float,
) -> Row:
    q, k, v = inputs
    row = Row(T, D, density, None, flash, sdpa)

    def ours() -> Tensor:
        return torch.ops.bla.piecewise_sparse_attention(q, k, v, density=density, block_size=BLOCK)

    out = ours().float()
    row.loss = ((out - truth).norm() / truth.norm()).item()
    wrong = _inaccuracy(q, k, v, density)
    if not wrong <= _ROUNDINGS:
        row.note = f"WRONG: {wrong:.0f} roundings off the formula, not timed"
        return row
    row.ms = measure.milliseconds(ours, device)
    read = sum(x.nbytes for x in inputs) / copy
    row.bound_ms = (density + 2 / BLOCK) * flash + read
    row.speedup, row.of_bound = flash / row.ms, row.ms / row.bound_ms
    return row


def _inaccuracy(q: Tensor, k: Tensor, v: Tensor, density: float) -> float:
    """The error of two heads against the formula in fp32, of the same selection, in roundings."""
    q, k, v = (x[:, :2] for x in (q, k, v))
    out, chosen = torch.ops.bla.piecewise_sparse_attention_forward(
        q, k, v, density=density, block_size=BLOCK
    )
    scale = float(piecewise._scale(None, q))
    truth = piecewise_aten.forward(q.float(), k.float(), v.float(), chosen, BLOCK, scale)
    error = ((out.float() - truth).norm() / truth.norm()).item()
    return error / torch.finfo(q.dtype).eps if error == error else float("inf")


def _inputs(T: int, D: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H, T, D) as views of what projections make, (1, T, H, D); bf16, on a CPU fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    at = torch.linspace(0, 1, T, device=device)[:, None]
    waves = (torch.pi * 8 * draw(8).abs() * at + draw(8)).sin()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def tensor() -> Tensor:
        smooth = (waves @ draw(8, HEADS * D)).view(1, T, HEADS, D)
        return (0.5 * smooth + 0.5 * draw(1, T, HEADS, D)).to(dtype).transpose(1, 2)

    return tensor(), tensor(), tensor()


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def _write(path: Path, rows: Sequence[Row], header: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for name, value in header.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(told)


def _plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Speed-up over the flash kernel and share of the bound, against T. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = sorted({row.D for row in rows})
    figure, axes = plt.subplots(1, len(dims), figsize=(9, 3.6), squeeze=False, layout="constrained")
    for axis, D in zip(axes[0], dims, strict=True):
        for density in DENSITIES:
            line = [row for row in rows if (row.D, row.density) == (D, density)]
            axis.plot(
                [r.T for r in line],
                [r.speedup or float("nan") for r in line],
                marker="o",
                label=density,
            )
        axis.set(title=f"D = {D}", xlabel="T", ylabel="times SDPA's flash kernel", xscale="log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="density")
    figure.suptitle(f"piecewise sparse attention, {title}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
