"""Fixtures for every test: the same seed, and nothing compiled by the test before."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    usual = "clang++" if sys.platform == "darwin" else "g++"
    no_compiler = shutil.which(os.environ.get("CXX", usual)) is None
    no_gpu = not torch.cuda.is_available()
    for item in items:
        if no_compiler and "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="Inductor needs g++ on a CPU, or CXX"))
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.manual_seed(0)
    _forget()
    yield
    _forget()


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rewritten does not depend on whether the CPU of the tests multiplies bfloat16."""
    monkeypatch.setattr("bla_inductor.compat.cpu_multiplies_bfloat16", lambda: False)


def _forget() -> None:
    if "torch._dynamo" in sys.modules:  # the algebra's tests need not pay for its import
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python(tmp_path: pathlib.Path) -> Run:
    """Runs a program in a process of its own, without the BLA_* and TORCH_* of this one."""
    file = tmp_path / "program.py"

    def run(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BLA_", "TORCH_"))}
        file.write_text(textwrap.dedent(program).lstrip())
        done = subprocess.run(
            [sys.executable, str(file)],
            env=clean | environ,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
