"""Training on an imagined GPU, from the program to what its kernels compute: see tests/imagined."""

from __future__ import annotations

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


def test_training_on_an_imagined_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.imagined"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("equal: ") == len(PROGRAMS)
