"""Every spelling is found, computes what it computed, gradients included, and no look-alike is
touched.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.compile.spellings import NEGATIVES, SPELLINGS, B, D, H, N, Spelling
from tests.counted import counted
from tests.numerics import assert_no_less_accurate

AOT = {"inner": "aot_eager"}


def inputs(case: Spelling, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).requires_grad_() for s in case.shapes]


def compiled(case: Spelling, **kwargs):
    return torch.compile(case.function, backend="bla", options=AOT, fullgraph=True, **kwargs)


@pytest.mark.parametrize("case", SPELLINGS, ids=lambda c: c.name)
def test_spelling(case: Spelling) -> None:
    counters.clear()
    run = compiled(case)
    assert_no_less_accurate(run, case.function, inputs(case))
    assert counters["bla"]["matched"] == case.matches


def longer(case: Spelling) -> list[torch.Tensor]:
    """The same with another number of tokens and of keys."""
    longer = {N: N + 7, 28: 31, 50: 53, 60: 64}
    shapes = tuple(tuple(longer.get(size, size) for size in s) for s in case.shapes)
    return inputs(replace(case, shapes=shapes), seed=1)


@pytest.mark.parametrize("case", [s for s in SPELLINGS if s.dynamic], ids=lambda c: c.name)
def test_spelling_dynamic(case: Spelling) -> None:
    """Symbolic sizes: matched as well, and a new length compiles nothing."""
    counters.clear()
    run = compiled(case, dynamic=True)
    assert_no_less_accurate(run, case.function, inputs(case))
    assert_no_less_accurate(run, case.function, longer(case))
    assert counted() == {"graphs": 1, "matched": case.matches, "refused": 0}


@pytest.mark.parametrize("case", NEGATIVES, ids=lambda c: c.name)
def test_look_alike_is_left_alone(case: Spelling) -> None:
    counters.clear()
    args = inputs(case)
    torch.testing.assert_close(compiled(case)(*args), case.function(*args))
    assert counters["bla"]["matched"] == 0


def test_rule_statistics() -> None:
    """How often each rule was asked what a tensor is, and how often it told."""

    def model(q, k, v):
        q = q.view(torch.int32).view(torch.float32)  # other bits: no rule knows what that means
        return q @ (k.mT @ v)

    counters.clear()
    args = [torch.randn(B, H, N, D) for _ in range(3)]
    torch.compile(model, backend="bla", options=AOT)(*args)
    assert counted() == {"graphs": 1, "matched": 1, "refused": 0}
    statistics = counters["bla"]
    assert (statistics["rule:matmul"], statistics["rule:matmul tried"]) == (2, 2)
    assert (statistics["rule:view"], statistics["rule:view tried"]) == (0, 2)
