"""The command: `python -m bla_inductor bench SUITE`, or `bench module:callable`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bla_inductor.bench import measure, models, output, pisa
from bla_inductor.bench.cases import SUITES, Case
from bla_inductor.bench.output import Row
from bla_inductor.bench.own import OwnModel
from bla_inductor.bench.providers import PROVIDERS, Attention, provider
from bla_inductor.example import Example, UsageError

__all__ = ["add_arguments", "run"]

_SDPA_LIMIT = (
    2**40
)  # score entries times head dim: beyond, softmax attention takes too long to wait


_SUITES = sorted([*SUITES, "models", "pisa"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suite", metavar="SUITE", help=f"one of {', '.join(_SUITES)}, or module:callable"
    )
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated")
    parser.add_argument("--lengths", default="", help="only these N, comma-separated")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--base", metavar="REF", help="also measure bla at this git revision")
    parser.add_argument(
        "--fresh", action="store_true", help="models: time compilations, with empty caches"
    )
    parser.add_argument("--no-plot", action="store_true")


def run(given: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    own = None
    if ":" in given.suite:
        own = OwnModel(given.suite.rpartition(":")[2], Example.load(given.suite))
        given.suite, given.device, given.no_plot = own.name, own.device, True
    elif given.suite not in _SUITES:
        raise UsageError(
            f"no suite {given.suite!r}; there are {', '.join(_SUITES)}, and module:callable, such "
            "as my_model.py:example, for a model of yours"
        )
    if given.suite == "pisa":  # approximate, so another opponent and other columns
        return pisa.run(given)
    _check(given)
    chosen = [name for name in given.providers.split(",") if name]
    unknown = [name for name in chosen if name not in PROVIDERS]
    if unknown:
        raise SystemExit(f"bench: no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    lengths = {int(n) for n in given.lengths.split(",") if n}
    if given.device == "cpu" and given.suite in ("dims", "seed", "shapes"):
        print(
            "these are sizes for a GPU, which a CPU takes hours for; see --lengths, or bench smoke"
        )
    cases = [
        c
        for c in SUITES.get(given.suite, [])
        if (not lengths or c.N in lengths) and given.only.lower() in c.name.lower()
    ]
    if not cases and own is None and given.suite != "models":
        raise SystemExit(f"bench: no case of the suite {given.suite!r} is as asked for")
    if given.device == "cpu" and any(c.memory for c in cases):
        raise SystemExit("bench: the suite 'memory' measures CUDA memory; it needs a GPU")
    copy = measure.bandwidth(given.device)
    header = output.machine(given.device, copy)
    print("  ".join(f"{k}: {v}" for k, v in header.items()))
    base = _base_times(given) if given.base else {}
    rows: list[Row] = []
    print(
        f"{'case':44}{'run':14}{'provider':>9}{'ms':>9}{'GB/s':>8}{'% copy':>7}{'× Ind.':>7}  note"
    )
    found = _rows(cases, chosen, given.device, copy)
    if own is not None:
        found = own.rows(chosen)
    elif given.suite == "models":
        found = models.run(chosen, given.device, lengths, given.only, given.fresh)
    try:
        for row in found:
            key = (row.case, row.shape, row.dtype, row.run)
            if row.provider == "bla" and row.ms and key in base:
                row.base_ratio = base[key] / row.ms
                row.note = f"{row.base_ratio:.2f}× {given.base} {row.note}".strip()
            rows.append(row)
            _show(row)
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows)} rows, which are kept")
    stem = given.out / f"{given.suite}-{header['device'].split(' (')[0].replace(' ', '-')}"
    output.write_csv(stem.with_suffix(".csv"), rows, header)
    print(f"wrote {stem.with_suffix('.csv')}")
    if not given.no_plot and any(r.ms is not None for r in rows):
        try:
            title = f"{given.suite}: {header['device']}, torch {header['torch']}"
            output.plot(stem.with_suffix(".png"), rows, title)
            print(f"wrote {stem.with_suffix('.png')}")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)")
    return int(any(r.note.startswith("WRONG") for r in rows))


def _check(given: argparse.Namespace) -> None:
    """Before anything is measured, what would fail after it was."""
    if not all(n.isdecimal() for n in given.lengths.split(",") if n):
        raise UsageError(f"--lengths {given.lengths} should be numbers, such as 1024,4096")
    if given.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {given.device}: torch sees no GPU here; --device cpu works")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {given.out} cannot be written: {error.strerror}") from error


def _rows(
    cases: Sequence[Case], providers: Sequence[str], device: str, copy: float
) -> Iterator[Row]:
    before = torch.get_float32_matmul_precision()
    try:
        for case in cases:
            torch.set_float32_matmul_precision(case.float32)
            yield from _case(case, providers, device, copy)
    finally:
        torch.set_float32_matmul_precision(before)


def _case(case: Case, providers: Sequence[str], device: str, copy: float) -> Iterator[Row]:
    inputs = measure.enough_inputs(case, device)
    inductor: dict[str, float] = {}  # by run: ms, or MiB
    for name in providers:
        function = provider(name, case)
        multiply_adds = case.B * case.H * case.N * case.keys * case.D
        if function is None or (name == "sdpa" and (multiply_adds > _SDPA_LIMIT or case.memory)):
            continue
        for row in _measured(case, name, function, inputs, device):
            cost = row.mib if case.memory else row.ms
            if cost is not None:
                if name == "inductor":
                    inductor[row.run] = cost
                if row.run in inductor:
                    row.inductor_ratio = inductor[row.run] / cost
            if row.gbps is not None:
                row.copy_percent = 100 * row.gbps * 1e6 / copy
            yield row


def _measured(
    case: Case, name: str, function: Attention, inputs: Sequence[measure.Inputs], device: str
) -> list[Row]:
    """The rows of one provider, without the comparisons."""
    shape = f"B{case.B} H{case.H} N{case.N} M{case.keys} D{case.D} Dv{case.channels}"
    kind = str(case.dtype).removeprefix("torch.") + (" in fp32" if case.upcast else "")
    kind += f" {case.float32}" if case.float32 != "highest" else ""

    def row(run: str) -> Row:
        return Row(case.name, shape, case.N, kind, case.phi, run, name)

    try:
        wrong = None if name == "sdpa" else measure.inaccuracy(function, case, inputs[0])
        if wrong is not None and not wrong <= 1:
            return [replace(row("forward"), inaccuracy=wrong, note="WRONG: not timed")]
        if case.memory:
            mib = measure.peak_bytes(function, inputs[0]) / 2**20
            return [replace(row("training step"), mib=mib, note=f"{mib:.0f} MiB")]
        with torch.no_grad():
            forward = measure.milliseconds([partial(function, *x.qkv) for x in inputs], device)
        both = measure.milliseconds([partial(_step, function, x, x.leaves) for x in inputs], device)
    except torch.cuda.OutOfMemoryError:
        return [replace(row("forward"), note="out of memory")]
    times = {"forward": forward, "backward": both - forward}
    floors = dict(zip(times, case.floor_bytes(), strict=True))
    return [
        replace(row(run), ms=ms, gbps=floors[run] / ms / 1e6, inaccuracy=wrong)
        for run, ms in times.items()
    ]


def _step(function: Attention, inputs: measure.Inputs, leaves: Sequence[Tensor]) -> object:
    return torch.autograd.grad(function(*leaves), leaves, inputs.do)


def _show(row: Row) -> None:
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    print(
        f"{row.case + ' ' + row.shape:44.44}{row.run:14}{row.provider:>9}{number(row.ms, 4):>9}"
        f"{number(row.gbps, 0):>8}{number(row.copy_percent, 0):>7}"
        f"{number(row.inductor_ratio, 2):>7}  {row.note}",
        flush=True,
    )


def _base_times(given: argparse.Namespace) -> dict[tuple[str, ...], float]:
    """The times of bla at the revision `--base`, installed beside this one, in its own process."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        tree, site, out = (Path(folder) / name for name in ("tree", "site", "out"))
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), given.base], check=True)
        try:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
            install += ["--no-build-isolation", "--target", str(site), str(tree)]
            subprocess.run(install, check=True)
            command = [sys.executable, "-m", "bla_inductor", "bench", given.suite, "--no-plot"]
            command += ["--providers", "bla", "--device", given.device, "--out", str(out)]
            command += ["--lengths", given.lengths] if given.lengths else []
            command += ["--only", given.only] if given.only else []
            subprocess.run(
                command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}
            )
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)
        (file,) = out.glob("*.csv")
        return {
            (r["case"], r["shape"], r["dtype"], r["run"]): float(r["ms"])
            for r in output.read_csv(file)
            if r["ms"]
        }
