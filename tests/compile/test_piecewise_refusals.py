"""Softmax attention that stays exact under options={"approximate": …}, and why; bad options."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from bla_inductor.errors import BlaOptionError
from bla_inductor.options import Options, Pisa
from bla_inductor.stamp import CacheStamp
from tests.compile.test_piecewise import PISA, B, D, H, M, N, draw, explain, sdpa


def masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(N, M, dtype=torch.bool))


def dropping(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def biased(q, k, v):
    bias = torch.arange(M) * 0.1
    return (q @ k.mT + bias).softmax(-1) @ v


def filled(q, k, v):
    above = torch.ones(N, M, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(above, -torch.inf).softmax(-1) @ v


def capped(q, k, v):
    return (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v


def reweighted(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.rand(N, M)) @ v


def gated(q, k, v):
    gate = torch.sigmoid(q @ q.sum(-2, keepdim=True).mT)
    return ((q @ k.mT).softmax(-1) * gate * torch.cos(q @ k.mT)) @ v


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def negative(q, k, v):
    return (q @ k.mT * -0.3).softmax(-1) @ v


def few_keys(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :, :77], v[:, :, :77])


def modified(q, k, v):
    q = torch.sin(q)
    scores = q @ k.mT
    q.mul_(3)
    return scores.softmax(-1) @ v + q.sum()


def wide(q, k, v):
    q, k = (x.repeat(1, 1, 1, 40) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (masked, "attention mask.*leave attn_mask out"),
        (dropping, r"dropout.*model\.eval\(\)"),
        (causal, "causal"),
        (grouped, "enable_gqa.*repeat the heads"),
        (biased, "`add` changes the scores before the softmax"),
        (filled, "`masked_fill` changes the scores|`where` changes the scores"),
        (capped, "`tanh` changes the scores"),
        (reweighted, "`mul` stands between the softmax and the values"),
        (gated, "further factors"),
        (over_queries, "does not run over just the axis"),
        (negative, "scaled by -0.3.*not known to be positive"),
        (few_keys, "77 keys are 5 blocks of 16.*rewrite.*always"),
        (modified, "modified in place"),
        (wide, "head dims of 320 and 8: the kernels take up to 256"),
    ],
)
def test_refusal(function, reason):
    report = explain(function, *draw())
    assert not report.matches
    (refusal,) = report.refusals
    assert refusal.family == "piecewise sparse attention"
    assert re.search(reason, refusal.reason), refusal.reason
    assert refusal.location.file == __file__


@pytest.mark.parametrize(
    ("density", "reason"),
    [(1.0, "all of which density=1 selects"), (0.9, "leaves .* of the arithmetic")],
)
def test_a_density_that_gains_nothing(density, reason):
    options = {"approximate": {"pisa": {"density": density, "block_size": 16}}}
    (refusal,) = explain(sdpa, *draw(), options=options).refusals
    assert re.search(reason, refusal.reason), refusal.reason


def test_what_is_no_softmax_attention_is_not_spoken_of():
    def model(q, k, v):
        pooled = q.softmax(-2) * k.sum(-2, keepdim=True)
        return (pooled.mT @ q).tanh() @ v.mT

    report = explain(model, *draw((B, H, N, D), (B, H, M, D), (B, H, N, D)))
    assert not [r for r in report if r.family == "piecewise sparse attention"]


def test_options():
    def parse(given=None, **environ):
        return Options.parse(given, environ=environ)[0]

    assert parse({"approximate": {"pisa": {}}}).approximate == Pisa(0.15, 64)
    assert parse(PISA).approximate == Pisa(0.25, 16)
    text = '{"pisa": {"density": 0.1}}'
    assert parse(BLA_APPROXIMATE=text).approximate == Pisa(0.1, 64)
    assert parse({"approximate": None}, BLA_APPROXIMATE=text).approximate is None
    assert parse(BLA_APPROXIMATE_TRAINING="1").approximate_training


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pisa", "approximate='pisa' should be {\"pisa\""),
        ({"sparse": {}}, 'should be {"pisa"'),
        ({"pisa": {"densty": 0.1}}, r"approximate\['pisa'\]={'densty': 0.1} should"),
        ({"pisa": {"density": 0}}, r"\['density'\]=0 should be 0 < density <= 1"),
        ({"pisa": {"density": "a"}}, r"\['density'\]='a' should"),
        ({"pisa": {"block_size": 48}}, r"\['block_size'\]=48 should be one of 16, 32, 64, 128"),
    ],
)
def test_bad_options(value, message):
    with pytest.raises(BlaOptionError, match=message):
        Options.parse({"approximate": value}, environ={})


def test_the_caches_tell_densities_apart():
    stamps = [CacheStamp(Options(approximate=p)).uuid() for p in (None, Pisa(0.1), Pisa(0.2))]
    assert len({str(s) for s in stamps}) == 3
