"""What the README says is true: its examples run, and its tables and commands exist."""

from __future__ import annotations

import pathlib
import re
from dataclasses import fields

import pytest
from torch._dynamo.utils import counters

from bla_inductor.options import Options, variable_of

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_in_order(monkeypatch, capsys, tmp_path):
    """They run as a program of one file each, because a report quotes source lines."""
    monkeypatch.setenv("BLA_INNER", "aot_eager")
    names: dict[str, object] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)):
        file = tmp_path / f"block{number}.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
    assert counters["bla"]["matched"] == 1
    assert f"{tmp_path / 'block0.py'}:6" in capsys.readouterr().out


def test_the_first_example_is_short():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in first.splitlines() if line.strip()]) == 6


@pytest.mark.parametrize("row", fields(Options), ids=lambda row: row.name)
def test_every_option_has_a_row(row):
    line = f"| `{row.name}` | `{variable_of(row.name)}` | `{row.default}` | "
    assert line in README
    described = README.split(line)[1].splitlines()[0]
    assert all(f"`{choice}`" in described for choice in row.metadata["choices"])


def test_every_command_is_a_target():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"\bmake (\w+)", README))
    assert commands
    assert commands <= targets


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
