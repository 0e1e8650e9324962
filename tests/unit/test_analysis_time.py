"""The analysis takes at most a millisecond a graph node, with symbolic sizes too.

On the largest graphs of the table of models. `benchmarks/analysis.py` tells more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite
from tests.models.table import MODELS

MILLISECONDS = 1.0
LARGEST = ("denoising-diffusion-pytorch Unet", "diffusers SanaTransformer2DModel")
ROWS = [row for row in MODELS if row.name in LARGEST]


class Enough(Exception):
    """Nothing has to be compiled after the analysis."""


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_node_takes_at_most_a_millisecond(row: Any, dynamic: bool) -> None:
    """Best of three, in CPU time of the thread: other processes do not count."""
    if not row.installed:
        pytest.skip(f"{row.package} is not installed")
    taken: list[float] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes = len(gm.graph.nodes)
        assert nodes > 200
        for mode in ("off", "off", "auto"):  # the last one edits the graph
            start = time.thread_time()
            report = rewrite(gm, inputs, Options(rewrite=mode))
            taken.append(1e3 * (time.thread_time() - start) / nodes)
        assert len(report.matches) == row.matches
        raise Enough

    model, (tensors, others) = row.make(), row.inputs()
    with pytest.raises(Exception, match="Enough"):
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*tensors, **others)
    *_, whole = taken
    assert min(taken) <= MILLISECONDS
    assert whole <= MILLISECONDS  # with what is emitted for each match, measured once


def test_the_rows_are_there() -> None:
    assert len(ROWS) == len(LARGEST)
