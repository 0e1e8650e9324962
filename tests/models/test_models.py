"""Real models, from the packages that ship them: how many attentions are found, and that nothing
changes. The rows are in table.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bla_inductor import Report, backend
from tests.models.checks import assert_same, stirred
from tests.models.table import MODELS, Model


def needs(rows: list[Model]) -> list[object]:
    def mark(row: Model) -> pytest.MarkDecorator:
        return pytest.mark.skipif(not row.installed, reason=f"{row.package} is not installed")

    return [pytest.param(row, id=row.name, marks=mark(row)) for row in rows]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """The reports of all graphs compiled in a test."""
    collected: list[Report] = []
    monkeypatch.setattr(backend, "announce", collected.append)
    return collected


def made(row: Model) -> nn.Module:
    return stirred(row.make()).eval()


def assert_expected(row: Model, reports: list[Report]) -> None:
    (report,) = reports  # one graph, compiled once
    assert len(report.matches) == row.matches
    assert sum("÷" in match.formula for match in report.matches) == row.normalised
    reasons = [refusal.reason for refusal in report.refusals]
    assert len(reasons) == len(row.refusals), reasons
    for reason, expected in zip(reasons, row.refusals, strict=True):
        assert expected in reason


@pytest.mark.parametrize("row", needs(MODELS))
def test_model(row: Model, reports: list[Report]) -> None:
    module = made(row)
    run = torch.compile(module, backend="bla", options={"inner": row.inner}, fullgraph=True)
    assert_same(run, module, row.inputs())
    assert_expected(row, reports)


@pytest.mark.parametrize("row", needs([row for row in MODELS if row.longer is not None]))
def test_one_compilation_serves_all_sizes(row: Model, reports: list[Report]) -> None:
    module = made(row)
    options = {"inner": row.inner}
    run = torch.compile(module, backend="bla", options=options, fullgraph=True, dynamic=True)
    for inputs in (row.inputs, row.longer):
        assert_same(run, module, inputs())
    assert_expected(row, reports)
