"""`bench module:callable`: the times of the user's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bla_inductor
from bla_inductor.__main__ import main
from bla_inductor.bench import measure, own
from bla_inductor.bench.output import read_csv
from bla_inductor.bench.own import OwnModel
from bla_inductor.example import Example

PROGRAM = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(8, 24), nn.BatchNorm1d(8)
        self.norm.eval()

    def forward(self, x, scale=1.0):
        q, k, v = self.qkv(x).relu().chunk(3, -1)
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1)
        return {"out": self.norm(out.mT) * scale, "positive": out > 0}

def attention(q, k, v):
    return q @ (k.mT @ v)

def model():
    return Model(), (torch.randn(2, 20, 8),), {"scale": 2.0}

def function():
    return attention, *torch.rand(3, 2, 20, 8)

def frozen():
    return Model().requires_grad_(False), torch.randn(2, 20, 8)
"""


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BLA_INNER", "eager")
    monkeypatch.setattr(measure, "bandwidth", lambda device: 1.0)
    path = tmp_path / "own_models.py"
    path.write_text(PROGRAM)
    return path


def bench(program: Path, name: str) -> tuple[int, list[dict[str, str]]]:
    arguments = ["--providers", "torch,bla", "--out", str(program.parent)]
    status = main(["bench", f"{program}:{name}", *arguments])
    (file,) = program.parent.glob(f"{name}-CPU*.csv")
    return status, read_csv(file)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("model", ["inference", "training step"]),
        ("function", ["inference", "training step"]),
        ("frozen", ["inference"]),
    ],
)
def test_each_run_is_timed_and_checked(program, name, runs, capsys) -> None:
    status, rows = bench(program, name)
    assert status == 0
    assert [(r["run"], r["provider"]) for r in rows] == [
        (run, provider) for run in runs for provider in ("torch", "bla")
    ]
    assert all(float(r["ms"]) > 0 for r in rows)
    out = capsys.readouterr().out
    assert out.count("1 matched, 0 refused") == len(runs)


def test_a_wrong_result_is_not_timed(program, monkeypatch, capsys) -> None:
    off = bla_inductor.Comparison("output 0", 1.0, 1e-7, 1e-6)
    found = bla_inductor.Verification([off])
    monkeypatch.setattr(own, "verify", lambda *_, **__: found)
    status, rows = bench(program, "function")
    assert status == 1
    assert [r["provider"] for r in rows if r["ms"]] == ["torch", "torch"]
    assert "WRONG: 1 of 1 results less accurate than allowed" in capsys.readouterr().out


def test_the_ratio_is_that_of_medians(monkeypatch) -> None:
    """And the providers take turns."""
    turns: list[str] = []

    def step(self: OwnModel, run: str, provider: str) -> str:
        return provider

    def called(provider: str, device: str) -> float:
        turns.append(provider)
        return {"torch": 3.0, "inductor": 2.0}[provider] * (1 if len(turns) > 4 else 100)

    monkeypatch.setattr(OwnModel, "_step", step)
    monkeypatch.setattr(measure, "called", called)
    mine = OwnModel("mine", Example(torch.nn.Linear(2, 2), (torch.ones(1, 2),), {}))
    rows = list(mine.rows(["inductor", "torch"]))
    assert turns[:4] == ["torch", "inductor"] * 2
    assert [(r.provider, r.ms, r.inductor_ratio) for r in rows[:2]] == [
        ("torch", 3.0, 2 / 3),
        ("inductor", 2.0, 1.0),
    ]


def test_training_flags_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[1].eval()
    list(OwnModel("mine", Example(model, (torch.ones(1, 2),), {})).rows(["torch"]))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_suite_says_what_there_is(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "seeds"])
    said = capsys.readouterr().err
    assert "no suite 'seeds'; there are dims, memory, models" in said
    assert "my_model.py:example" in said
