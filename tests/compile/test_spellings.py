"""Every spelling is found, computes what it computed, gradients included, and no look-alike is
touched.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.compile.spellings import NEGATIVES, SPELLINGS, Spelling
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


@pytest.mark.parametrize("case", [s for s in SPELLINGS if s.dynamic], ids=lambda c: c.name)
def test_spelling_dynamic(case: Spelling) -> None:
    counters.clear()
    run = compiled(case, dynamic=True)
    assert_no_less_accurate(run, case.function, inputs(case))
    assert counters["bla"]["matched"] == case.matches


@pytest.mark.parametrize("case", NEGATIVES, ids=lambda c: c.name)
def test_look_alike_is_left_alone(case: Spelling) -> None:
    counters.clear()
    args = inputs(case)
    torch.testing.assert_close(compiled(case)(*args), case.function(*args))
    assert counters["bla"]["matched"] == 0
