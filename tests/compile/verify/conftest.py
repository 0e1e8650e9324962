"""What every test of `verify` runs in."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

import bla_inductor
from bla_inductor import (
    examination,
    reproduction,
    verifier,
)


@pytest.fixture(autouse=True)
def _inner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_INNER", "eager")


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[bla_inductor.Verification]:
    """What each examination found, in order."""
    found: list[bla_inductor.Verification] = []

    def examine(*args: Any) -> bla_inductor.Verification:
        found.append(examination.examine(*args))
        return found[-1]

    monkeypatch.setattr(verifier, "examine", examine)
    return found


@pytest.fixture(autouse=True)
def scripts_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(reproduction.tempfile, "tempdir", str(tmp_path))
    return tmp_path
