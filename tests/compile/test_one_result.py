"""An attention whose result is read in several ways is one operator, and what shares memory in the
program shares it still.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

Results = tuple[Tensor, Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 30)


def itself_and_a_view(q: Tensor, k: Tensor, v: Tensor) -> Results:
    out = attention(q, k, v)
    return out, out.transpose(1, 2)


def two_views(q: Tensor, k: Tensor, v: Tensor) -> Results:
    out = attention(q, k, v)
    return out.transpose(1, 2), out.unflatten(-1, (2, 4))


def a_view_of_a_view(q: Tensor, k: Tensor, v: Tensor) -> Results:
    out = attention(q, k, v).transpose(1, 2)
    return out.flatten(2), out


def a_view_that_is_written(q: Tensor, k: Tensor, v: Tensor) -> Results:
    out = q @ (k.mT @ v)
    out.transpose(1, 2).mul_(2)
    return out, out.transpose(0, 1)


FUNCTIONS = [itself_and_a_view, two_views, a_view_of_a_view, a_view_that_is_written]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_result(function: Callable[..., Results], gradients: bool) -> None:
    given = [torch.rand(2, 3, 20, 8, requires_grad=gradients) for _ in range(3)]
    counters.clear()
    options = {"inner": "aot_eager", "rewrite": "always"}
    ours = torch.compile(function, backend="bla", options=options)(*given)
    eager = function(*given)
    torch.testing.assert_close(ours, eager)
    assert counters["bla"]["matched"] == 1
    if not gradients:
        (a, b), (c, d) = ([x.untyped_storage()._cdata for x in each] for each in (ours, eager))
        assert (a == b) is (c == d)
