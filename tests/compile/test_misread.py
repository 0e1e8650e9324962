"""Values, gradients, arguments, shared memory and random numbers of programs that are easily
misread are those of the program as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from tests.compile.misread import MISREAD, Inputs


def ran(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """(tensors, facts): results, gradients and what the arguments hold; how results lie, share
    memory, and what is drawn next.
    """
    torch.manual_seed(7)
    outs = pytree.tree_leaves(function(*inputs))
    facts = [
        (x.shape, x.stride(), x.requires_grad, [x.untyped_storage()._cdata == y for y in places])
        for places in [[y.untyped_storage()._cdata for y in (*outs, *inputs)]]
        for x in outs
    ]
    after = [x.detach().clone() for x in inputs]
    drawn = torch.rand(())
    wanted = [x for x in inputs if x.requires_grad]
    roots = [x for x in outs if x.requires_grad]
    incoming = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in roots]
    grads = torch.autograd.grad(roots, wanted, incoming, materialize_grads=True) if wanted else ()
    return [*(x.detach() for x in outs), *after, *grads, drawn], facts


@pytest.mark.parametrize(
    ("function", "inputs", "matches"), MISREAD, ids=[f.__name__ for f, *_ in MISREAD]
)
def test_nothing_changes(function: Callable[..., Any], inputs: Inputs, matches: int) -> None:
    options = {"inner": "eager", "rewrite": "always"}
    compiled = torch.compile(function, backend="bla", options=options)
    torch.manual_seed(0)
    given = inputs()
    counters.clear()
    found = []
    for f in (compiled, function):
        own = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
        found.append(ran(f, own))
    (ours, our_facts), (theirs, their_facts) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert our_facts == their_facts
    assert counters["bla"]["matched"] == matches
