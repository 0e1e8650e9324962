"""Rows as CSV with the machine in its header, as a table, and as plots."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bla_inductor._version import __version__

__all__ = ["Row", "machine", "plot", "read_csv", "write_csv"]


@dataclass
class Row:
    """One measurement. gbps: the floor's bytes over the time; copy_percent: of copy bandwidth;
    inductor_ratio: Inductor's time (or memory) over this one; inaccuracy: error over what is
    allowed.
    """

    case: str
    shape: str
    N: int
    dtype: str
    phi: str
    run: str  # "forward", "backward" or "training step"
    provider: str
    ms: float | None = None
    gbps: float | None = None
    copy_percent: float | None = None
    mib: float | None = None
    inductor_ratio: float | None = None
    inaccuracy: float | None = None
    base_ratio: float | None = None
    note: str = ""


def machine(device: str, copy: float) -> dict[str, str]:
    """What the numbers were measured on."""
    told = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "bla": f"{__version__} {_commit()}".strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy GB/s": f"{copy / 1e6:.0f}",
    }
    if device == "cpu":
        return told | {"device": f"CPU ({torch.get_num_threads()} threads)"}
    import triton

    properties = torch.cuda.get_device_properties(0)
    return told | {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def write_csv(path: Path, rows: Iterable[Row], header: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for name, value in header.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in asdict(row).items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Time against N, a line a provider, a panel a pass; log-log. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r.ms is not None]
    panels = list(dict.fromkeys((r.case, r.run) for r in timed))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (case, run) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(r.provider for r in timed):
            points = [
                (r.N, r.ms) for r in timed if (r.case, r.run, r.provider) == (case, run, name)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(title=f"{case}, {run}", xlabel="N", ylabel="ms", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
