"""What fuzzing found, one test each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite

ATTENTION = torch.ops.bla.linear_attention.default


class Rewritten:
    """Rewrites, keeps the report and the operators of the graph, and hands on to aot_eager."""

    def __init__(self) -> None:
        self.report = Report()
        self.targets: list[Any] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.report += rewrite(gm, inputs, Options(rewrite="always", strict=True))
        self.targets += [node.target for node in gm.graph.nodes]
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def run(function: Any, *inputs: Tensor, **options: Any) -> Rewritten:
    """`function` compiled gives what it gives in eager mode, gradients included."""
    backend = Rewritten()
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    wanted = [x for x in inputs if x.requires_grad]
    found = []
    for f in (compiled, function):
        outs = list(torch.utils._pytree.tree_leaves(f(*inputs)))
        found.append(outs)
        if wanted:
            found[-1] = outs + list(torch.autograd.grad(sum(x.sin().sum() for x in outs), wanted))
    torch.testing.assert_close(*found)
    return backend


def qkv(*shape: int, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for _ in range(3)]


def divided_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = q @ (k.mT @ v)
    return out.div_(q @ k.sum(-2).unsqueeze(-1))


@pytest.mark.parametrize(
    "after",
    [
        lambda out: out.transpose(1, 2).reshape(2, 6, 4),  # a view, of one head
        lambda out: (out[..., 1:] * 2, out[:, :, :3]),
    ],
)
def test_division_in_place_before_a_view_leaves_nothing_behind(after):
    """The division had written to memory that a view of its replacement seemed to share."""
    seen = run(lambda *x: after(divided_in_place(*x)), *qkv(2, 1, 6, 4))
    assert len(seen.report.matches) == 1
    assert seen.targets.count(ATTENTION) == 1
    assert "div_" not in seen.targets


def test_writes_to_views_of_what_was_replaced_stay():
    def function(q, k, v):
        out = divided_in_place(q, k, v)
        part = out[:, :, :3]
        part.mul_(2)
        return out * 1.0

    run(function, *qkv(2, 1, 6, 4))


def test_operand_modified_in_place_later():
    """What the operator saves for its backward may not change. Eager mode saved copies."""

    def function(q, k, v):
        k = k.roll(1, -1)
        scores = torch.bmm(
            q.transpose(1, 2).reshape(6, 5, 4), k.transpose(1, 2).reshape(6, 5, 4).mT
        )
        out = torch.bmm(scores, v.transpose(1, 2).reshape(6, 5, 4)) * 1.0
        k.mul_(2)
        return out, k

    seen = run(function, *qkv(2, 5, 3, 4, grad=True))
    assert "is modified in place later" in seen.report.refusals[0].reason
    assert len(run(function, *qkv(2, 5, 3, 4)).report.matches) == 1


def test_number_of_heads_is_a_symbolic_quotient():
    """Torch tells some strides as max(1, heads) and others as heads."""

    def function(q, k, v):
        q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in (q, k, v))
        return (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)

    assert len(run(function, *qkv(2, 6, 12), dynamic=True).report.matches) == 1


@pytest.mark.parametrize(("heads", "dims"), [(1, (4, 4, 4)), (3, (4, 4, 4)), (1, (4, 4, 7))])
def test_numbers_of_heads_are_symbolic_quotients_that_differ(heads, dims):
    """Torch has a guard that they are equal, or one, and tells each in its own symbols."""

    def function(*tensors):
        q, k, v = (
            x.unflatten(-1, (x.shape[-1] // d, d)).transpose(1, 2)
            for x, d in zip(tensors, dims, strict=True)
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))

    tensors = [torch.randn(2, 6, heads * d, dtype=torch.float64).requires_grad_() for d in dims]
    assert len(run(function, *tensors, dynamic=True).report.matches) == 1


@pytest.mark.parametrize("heads", [1, 3])
def test_one_head_of_keys_is_a_symbolic_quotient(heads):
    def function(q, k, v):
        q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in (q, k, v))
        return (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)

    q, k, v = qkv(2, 6, 4 * heads, grad=True)
    k = k[..., :4].detach().requires_grad_()
    assert len(run(function, q, k, v, dynamic=True).report.matches) == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_numbers_of_heads_are_quotients_of_chunks(heads):
    """The last chunk is what the others leave, and its number of heads a difference."""

    def function(x):
        q, k, v = (part.unflatten(1, (-1, 2)).mT for part in x.flatten(2).chunk(3, dim=1))
        return q.exp() @ (k.exp().mT @ v)

    x = torch.randn(2, 3 * heads * 2, 1, 7, dtype=torch.float64, requires_grad=True)
    assert len(run(function, x, dynamic=True).report.matches) == 1


def test_sizes_of_what_is_inside_are_no_readers():
    """With dynamic sizes, `out.shape` is a node that kept numerator and features outside."""

    def function(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        out = (q * q.shape[-1] ** -0.5) @ (k.mT @ v)
        z = q @ k.sum(-2).unsqueeze(-1)
        torch.broadcast_shapes(out.shape, z.shape)
        return out / z

    seen = run(function, *qkv(2, 3, 6, 4), dynamic=True)
    (match,) = seen.report.matches
    assert "q = φ(" in str(match)
    assert "read by other code" not in str(match)
    assert seen.targets.count(ATTENTION) == 1
