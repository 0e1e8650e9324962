"""The benchmark suite `pisa`: what it writes, and that a wrong result is not timed."""

from __future__ import annotations

import torch

from bla_inductor.__main__ import main
from bla_inductor.bench import pisa
from bla_inductor.bench.output import read_csv


def bench(tmp_path, monkeypatch) -> tuple[int, list[dict[str, str]]]:
    monkeypatch.setattr(pisa, "DENSITIES", (0.25,))
    monkeypatch.setattr(pisa, "HEADS", 2)
    common = ["--device", "cpu", "--out", str(tmp_path), "--no-plot", "--lengths", "512"]
    status = main(["bench", "pisa", *common])
    (file,) = tmp_path.glob("*.csv")
    assert f"# torch: {torch.__version__}" in file.read_text()
    return status, read_csv(file)


def test_rows(tmp_path, monkeypatch) -> None:
    status, rows = bench(tmp_path, monkeypatch)
    assert status == 0
    cases = [(r["T"], r["D"], r["density"]) for r in rows]
    assert cases == [("512", "64", "0.25"), ("512", "128", "0.25")]
    for row in rows:
        flash, ms = float(row["flash_ms"]), float(row["ms"])
        assert abs(float(row["speedup"]) - flash / ms) <= 0.01 * flash / ms
        assert float(row["bound_ms"]) > (0.25 + 2 / 64) * flash * 0.99
        assert 0 < float(row["loss"]) < 0.5


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pisa, "_ROUNDINGS", -1.0)
    status, rows = bench(tmp_path, monkeypatch)
    assert status == 1
    assert all(row["ms"] == "" and row["note"].startswith("WRONG") for row in rows)
