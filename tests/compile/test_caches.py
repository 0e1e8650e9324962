"""Inductor's caches, in processes of their own: the second is served what the first has compiled,
unless something of bla's has changed in between.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
    import json, pathlib
    import torch
    from torch._dynamo.utils import counters
    from bla_inductor import stamp

    def attention(q, k, v):
        return q @ (k.mT @ v)

    def train(**options):
        torch._dynamo.reset()
        counters.clear()
        stamp.source_hash.cache_clear()
        q, k, v = (torch.rand(1, 2, 256, 16).requires_grad_() for _ in range(3))
        out = torch.compile(attention, backend="bla", options=options, fullgraph=True)(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v))
        out.sum().backward()
        assert counters["bla"]["matched"] == 1
        print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))

    package = pathlib.Path(stamp.__file__).parent
    train()
"""

CHANGES = """
    for part in ("kernels", "patterns"):
        with (package / part / "__init__.py").open("a") as file:
            file.write("# changed")
        train()
    train(rewrite="always")
"""


@pytest.fixture
def installed(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of bla that may be changed: the folder to put on PYTHONPATH."""
    ignored = shutil.ignore_patterns("__pycache__")
    package = tmp_path / "site" / "bla_inductor"
    shutil.copytree(ROOT / "bla_inductor", package, ignore=ignored)
    for part in ("patterns", "kernels"):
        shutil.copytree(ROOT / part, package / part, ignore=ignored)
    return package.parent


def hits(counted: dict[str, int]) -> dict[str, int]:
    names = ("fxgraph_cache_hit", "autograd_cache_hit", "fxgraph_cache_miss", "autograd_cache_miss")
    assert not any("bypass" in name for name in counted)
    return {name: counted[name] for name in names if counted.get(name)}


@pytest.mark.slow
def test_a_second_process_hits_and_whatever_changes_misses(run_python, tmp_path, installed) -> None:
    """Kernel sources, pattern sources, and an option."""
    environ = {
        "PYTHONPATH": str(installed),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # slower than what they are for
    }
    (cold,) = run_python(PROGRAM, **environ).stdout.splitlines()
    assert hits(json.loads(cold)).keys() == {"fxgraph_cache_miss", "autograd_cache_miss"}

    again = run_python(PROGRAM + CHANGES, **environ).stdout.splitlines()
    warm, *changed = (hits(json.loads(line)).keys() for line in again)
    assert warm == {"fxgraph_cache_hit", "autograd_cache_hit"}
    assert changed == [{"fxgraph_cache_miss", "autograd_cache_miss"}] * 3
