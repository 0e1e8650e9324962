"""When the rewrite pays, and the words for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bla_inductor.kernels import large

import bla_inductor
from bla_inductor.cost import Problem, decide

ATTENTION = Problem(
    batch=16,
    n=4096,
    m=4096,
    c=64,
    d=64,
    quadratic=False,
    normalised=True,
    device="cuda",
    itemsize=2,
)


def test_the_plain_case_pays_by_its_bytes() -> None:
    decision = decide(ATTENTION)
    assert decision.pays
    # q, k, v and the result: 4 tensors of 16 heads × 4096 × 64 × 2 bytes
    assert "32 MiB" in decision.reason


def test_a_quadratic_spelling_pays_by_its_flops() -> None:
    decision = decide(replace(ATTENTION, quadratic=True))
    assert decision.pays
    assert "64.0× fewer FLOPs" in decision.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"c": 300}, "the kernels take at most 256"),
        ({"d": 160}, "only in bfloat16 (float16: inference, to 192)"),
        ({"c": 36, "d": 36}, "q, k and v into padded rows"),
        ({"copied": 5}, "5 of its tensors have their channels apart"),
        ({"normalised": False, "copied": 2}, "takes longer than"),
        ({"normalised": False, "copied": 3, "mapped": 2}, "takes longer than"),
        ({"copied": 4}, "takes longer than"),
        ({"gradients": True, "copied": 4}, "takes longer than"),
        ({"quadratic": True, "n": 16, "m": 16}, "fewer FLOPs than q(kᵀv), so it stays"),
        ({"normalised": False, "m": 64}, "no long axis"),
        ({"alive": "scores"}, "scores q·kᵀ is read by other code"),
        ({"alive": "state", "normalised": False}, "state kᵀv is read by other code"),
        ({"alive": "numerator", "normalised": True}, "the division stays outside the operator"),
        ({"alive": "numerator", "normalised": False}, "that is replaced as a whole"),
        (
            {"gradients": True, "float32": "highest", "itemsize": 4, "c": 128},
            "set_float32_matmul_precision",
        ),
    ],
)
def test_refusals_say_why(change, reason) -> None:
    decision = decide(replace(ATTENTION, **change))
    assert not decision.pays
    assert reason in decision.reason


@pytest.mark.parametrize(
    "change",
    [
        {"copied": 3},
        {"copied": 3, "gradients": True},
        {"copied": 3, "normalised": False, "gradients": True},
        {"copied": 1, "normalised": False},
        {"copied": 2, "mapped": 1, "normalised": False},
        {"copied": 3, "normalised": False, "quadratic": True},
        {"copied": 5, "gradients": True, "upcast": True},
    ],
)
def test_few_copies_pay_and_those_beside_a_slow_graph(change) -> None:
    assert decide(replace(ATTENTION, **change)).pays


@pytest.mark.parametrize(
    "change",
    [
        {"c": 300},
        {"c": 36},
        {"gradients": True, "copied": 5},
        {"quadratic": True, "n": 16, "m": 16},
        {"gradients": True, "float32": "highest"},
    ],
)
def test_limits_of_the_kernels_do_not_bind_elsewhere(change) -> None:
    assert decide(replace(ATTENTION, device="cpu", **change)).pays


def test_bfloat16_stays_where_a_cpu_multiplies_it() -> None:
    on_cpu = replace(ATTENTION, device="cpu", bfloat16_products=True)
    assert "Inductor's products are in bfloat16" in decide(on_cpu).reason
    assert not decide(on_cpu).pays
    assert decide(replace(on_cpu, quadratic=True)).pays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_which_products_are_in_bfloat16(monkeypatch, dtype) -> None:
    monkeypatch.setattr("bla_inductor.compat.cpu_multiplies_bfloat16", lambda: True)
    x = torch.rand(2, 64, 8, dtype=dtype)
    narrow = bla_inductor.explain(lambda q, k, v: q @ (k.mT @ v), x, x, x)
    assert bool(narrow.matches) == (dtype != torch.bfloat16)
    wide = bla_inductor.explain(lambda q, k, v: q.float() @ (k.mT.float() @ v.float()), x, x, x)
    assert wide.matches


def test_a_state_read_elsewhere_is_cheap_beside_a_normaliser() -> None:
    assert decide(replace(ATTENTION, alive="state")).pays


def test_wide_heads_pay_where_there_are_kernels_for_them() -> None:
    assert decide(replace(ATTENTION, c=160, d=160, wide=True)).pays
    assert not decide(replace(ATTENTION, c=160, d=160, wide=True, n=256)).pays
    assert not decide(replace(ATTENTION, c=512, d=512, wide=True)).pays


@pytest.mark.parametrize(
    ("d", "dv", "dtype", "capability", "gradients", "pays"),
    [
        (160, 160, torch.bfloat16, 9, True, True),
        (256, 256, torch.bfloat16, 9, True, True),
        (160, 160, torch.float16, 9, False, True),
        (160, 160, torch.float16, 9, True, False),
        (256, 256, torch.float16, 9, False, False),
        (160, 160, torch.float32, 9, False, False),
        (160, 128, torch.bfloat16, 9, False, False),
        (136, 136, torch.bfloat16, 9, False, False),
        (160, 160, torch.bfloat16, 8, False, False),
    ],
)
def test_which_wide_heads_have_kernels(d, dv, dtype, capability, gradients, pays) -> None:
    assert large.pays_above_128(d, dv, dtype, capability, gradients) == pays
