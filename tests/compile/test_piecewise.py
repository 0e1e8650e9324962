"""Softmax attention under options={"approximate": …}: what is recognised, what is refused and why,
and that nothing is approximated without being asked for, or without being said.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bla_inductor.logs import announce
from bla_inductor.options import Options
from bla_inductor.report import Report
from bla_inductor.rewrite import rewrite
from tests.counted import counted

PISA = {"approximate": {"pisa": {"density": 0.25, "block_size": 16}}}
B, H, N, M, D, E = 2, 2, 40, 136, 8, 8
BHND = ((B, H, N, D), (B, H, M, D), (B, H, M, E))


def pisa(q, k, v, scale=None):
    return torch.ops.bla.piecewise_sparse_attention(
        q, k, v, density=0.25, block_size=16, scale=scale
    )


def draw(*shapes, grad=False):
    return [torch.randn(s).requires_grad_(grad) for s in shapes or BHND]


def compiled(function, options=PISA, **kwargs):
    counters.clear()
    options = {"inner": "aot_eager", **options}
    return torch.compile(function, backend="bla", options=options, fullgraph=True, **kwargs)


def explain(function, *args, options=PISA, graphs=None):
    reports = []

    def backend(gm, inputs):
        reports.append(rewrite(gm, inputs, Options.parse({"inner": "eager", **options})[0]))
        if graphs is not None:
            graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return sum(reports, Report())


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.5)


def matmul(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def scaled_operands(q, k, v):
    scale = q.shape[-1] ** -0.25
    return torch.matmul(F.softmax((q * scale) @ (k * scale).transpose(-2, -1), dim=-1), v)


def einsum(q, k, v):
    scores = torch.einsum("bhnc,bhmc->bhnm", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(dim=-1), v)


def keys_first(q, k, v):
    scores = torch.einsum("bhmc,bhnc->bhmn", k, q) * q.shape[-1] ** -0.5
    return (v.mT @ scores.softmax(-2)).mT


def baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    out = torch.bmm(scores.float().softmax(-1).to(q.dtype), v)
    return out.unflatten(0, (B, H))


def products_and_sums(q, k, v):
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def result_scaled(q, k, v):
    return matmul(q, k, v) * 0.5 * 2


def dropout_in_eval(q, k, v):
    scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return F.dropout(scores, 0.1, training=False) @ v


@pytest.mark.parametrize(
    "function",
    [
        sdpa,
        matmul,
        scaled_operands,
        einsum,
        keys_first,
        baddbmm,
        products_and_sums,
        result_scaled,
        dropout_in_eval,
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_spelling(function, dynamic):
    args = draw()
    ours = compiled(function, dynamic=dynamic)(*args)
    assert counted() == {"graphs": 1, "matched": 1, "refused": 0}
    torch.testing.assert_close(ours, pisa(*args), rtol=1e-4, atol=1e-5)
    assert ours.stride() == function(*args).stride()
    assert (ours - function(*args)).norm() > 0.05 * ours.norm()  # it is an approximation


def test_a_new_length_compiles_nothing():
    run = compiled(matmul, dynamic=True)
    for keys in (136, 160, 210):
        args = draw((B, H, N, D), (B, H, keys, D), (B, H, keys, E))
        torch.testing.assert_close(run(*args), pisa(*args), rtol=1e-4, atol=1e-5)
    assert counters["bla"]["graphs"] == 1


def test_the_scale_of_the_user_counts():
    args = draw()
    torch.testing.assert_close(compiled(sdpa_scaled)(*args), pisa(*args, scale=0.5))
    ours = compiled(lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ (v * 3))(*args)
    torch.testing.assert_close(ours, 3 * pisa(*args, scale=0.5), rtol=1e-4, atol=1e-5)


def test_heads_inside_and_reshaped():
    """q, k, v are views of one projection, and the result is merged back."""

    def model(x):
        q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    (x,) = draw((B, M, 3 * H * D))
    q, k, v = x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    ours = compiled(model)(x)
    torch.testing.assert_close(ours, pisa(q, k, v).transpose(1, 2).flatten(2))
    assert counters["bla"]["matched"] == 1
    assert ours.stride() == model(x).stride()
    graphs = []
    explain(model, x, graphs=graphs)
    assert not [n for gm in graphs for n in gm.graph.nodes if "clone" in str(n.target)]


def test_one_headed_keys():
    def model(q, k, v):
        scores = torch.einsum("bhnc,bmc->bhnm", q, k) * D**-0.5
        return torch.einsum("bhnm,bmd->bhnd", scores.softmax(-1), v)

    q, k, v = draw((B, H, N, D), (B, M, D), (B, M, E))
    merged = pisa(q.flatten(1, 2), k, v).unflatten(1, (H, N))
    torch.testing.assert_close(compiled(model)(q, k, v), merged, rtol=1e-4, atol=1e-5)
    assert counters["bla"]["matched"] == 1


def test_images():
    """Keys on two axes, tokens last."""

    def model(q, k, v):
        scores = torch.einsum("bcn,bcm->bnm", q.flatten(2), k.flatten(2)) * D**-0.5
        return torch.einsum("bnm,bdm->bdn", scores.softmax(-1), v.flatten(2)).view(B, D, 4, 40)

    args = draw(*[(B, D, 4, 40)] * 3)
    q, k, v = (x.flatten(2).mT for x in args)
    ours = compiled(model)(*args)
    torch.testing.assert_close(ours, pisa(q, k, v).mT.reshape(B, D, 4, 40), rtol=1e-4, atol=1e-5)
    assert counters["bla"]["matched"] == 1


@pytest.mark.parametrize("function", [sdpa, matmul])
def test_autocast(function):
    args = draw()
    run = compiled(function)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = run(*args), function(*args)
    assert counters["bla"]["matched"] == 1
    assert ours.dtype == eager.dtype
    torch.testing.assert_close(ours.float(), pisa(*args), rtol=0.1, atol=0.1)


def test_checkpoint_body():
    def model(q, k, v):
        return checkpoint(sdpa, q, k, v, use_reentrant=False) * 2

    args = draw()
    torch.testing.assert_close(compiled(model)(*args), pisa(*args) * 2)
    assert counters["bla"]["matched"] == 1


def test_beside_linear_attention():
    """Both families in one graph, one feeding the other."""

    def model(q, k, v):
        linear = q @ (k.mT @ v)
        return sdpa(linear, k, v)

    args = draw()
    q, k, v = args
    ours = compiled(model, {**PISA, "rewrite": "always"})(*args)
    assert counters["bla"]["matched"] == 2
    torch.testing.assert_close(ours, pisa(q @ (k.mT @ v), k, v), rtol=1e-3, atol=1e-4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_gradients_are_refused():
    model, x = Block(), torch.randn(2, M, 16)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert counted() == {"graphs": 1, "matched": 0, "refused": 1}
    (refusal,) = explain(model, x).refusals
    assert "needs gradients" in refusal.reason
    assert "torch.no_grad()" in refusal.reason
    assert "approximate_training" in refusal.reason
    with torch.no_grad():
        compiled(model)(x)
    assert counters["bla"]["matched"] == 1


def test_gradients_of_the_approximation():
    model, x = Block(), torch.randn(2, M, 16)
    ours = compiled(model, {**PISA, "approximate_training": True})(x)
    assert counters["bla"]["matched"] == 1
    ours.square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    q, k, v = model.qkv(x).unflatten(-1, (3, H, 8)).permute(2, 0, 3, 1, 4)
    inner = torch.ops.bla.piecewise_sparse_attention(
        q, k, v, density=0.25, block_size=16, approximate_training=True
    )
    model.out(inner.transpose(1, 2).flatten(2)).square().sum().backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    args = draw()
    run = compiled(lambda q, k, v: sdpa(q * 2, k, v) + 1, {**PISA, "inner": "inductor"})
    torch.testing.assert_close(run(*args), pisa(args[0] * 2, *args[1:]) + 1)
    assert counters["bla"]["matched"] == 1


def test_off_by_default():
    args = draw()
    torch.testing.assert_close(compiled(sdpa, {})(*args), sdpa(*args))
    assert counters["bla"]["matched"] == 0


def test_only_reported():
    args = draw()
    options = {**PISA, "rewrite": "off"}
    torch.testing.assert_close(compiled(sdpa, options)(*args), sdpa(*args))
    (refusal,) = explain(sdpa, *args, options=options).refusals
    assert "it matches, out[…,n,d] = Σ_m softmax_m" in refusal.reason


def test_never_silent(caplog):
    report = explain(matmul, *draw())
    (match,) = report.matches
    assert "results are approximate" in str(report)
    assert "the 2 most important of 9 blocks of 16 keys" in match.approximate
    assert match.location.code == "return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v"
    assert "1 matched (1 approximate)" in report.summary()
    with caplog.at_level(logging.WARNING, logger="bla_inductor"):
        announce(report)
    assert "results are approximate" in caplog.text
