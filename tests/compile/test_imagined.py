"""Training on an imagined GPU, from the program to what its kernels compute: see tests/imagined."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.imagined.programs import PROGRAMS

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="imagines CUDA for a torch without"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_training_on_an_imagined_gpu() -> None:
    assert run("tests.imagined").count("equal: ") == len(PROGRAMS)


def test_what_a_model_is_compiled_to_beside_inductor() -> None:
    """FLatten's attention at its real size: fewer kernels, and less that they write."""
    inference, training = run("tests.imagined.models", "flatten").splitlines()
    for line, count in ((inference, 3), (training, 6)):
        numbers = map(float, re.findall(r"[\d.]+", line.partition(":")[2]))
        before, after, templates, calls, written, then = numbers
        assert after < before
        assert then < written
        assert (templates, calls) == (count, 0)
