"""`python -m bla_inductor explain`."""

from __future__ import annotations

import pytest

from bla_inductor.__main__ import main

PROGRAM = """
import torch

def attention(q, k, v, scale=1.0):
    return q @ (k.mT @ v) * scale

def softmax(q, k, v):
    return (q @ k.mT).softmax(-1) @ v

def tensors():
    return torch.randn(3, 2, 3, 20, 8)

def positional():
    return attention, *tensors()

def with_keywords():
    return attention, tuple(tensors()), {"scale": 0.5}

def nothing():
    return softmax, *tensors()

def wrong():
    return 3
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("name", ["positional", "with_keywords"])
def test_a_match_is_printed_with_its_line(program, name, capsys) -> None:
    assert main(["explain", f"{program}:{name}"]) == 0
    out = capsys.readouterr().out
    assert f"{program}:5" in out
    assert "1 matched" in out
    assert ("0.5" in out) == (name == "with_keywords")


def test_without_a_match_the_nearest_candidate_is_printed(program, capsys) -> None:
    assert main(["explain", f"{program}:nothing"]) == 1
    out = capsys.readouterr().out
    assert f"{program}:8" in out
    assert "a softmax stands between the two products" in out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models", "should be module:callable"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("PROGRAM:missing", "has no callable 'missing'; it has attention, softmax"),
        ("PROGRAM:wrong", "should return (model, *args)"),
        ("PROGRAM:attention", "is called without arguments (missing a required argument: 'q')"),
    ],
)
def test_wrong_targets_say_what_is_right(program, target, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["explain", target.replace("PROGRAM", str(program))])
    assert message in capsys.readouterr().err


def test_a_wrong_variable_is_one_line(program, monkeypatch, capsys) -> None:
    monkeypatch.setenv("BLA_REWRITE", "offf")
    with pytest.raises(SystemExit):
        main(["explain", f"{program}:positional"])
    assert "option BLA_REWRITE='offf' should be one of auto, always, off" in capsys.readouterr().err
