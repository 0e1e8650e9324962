"""Every kernel compiles for sm_80, sm_90 and sm_100 with the run-time heuristics' parameters, and
spills nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
import ahead_of_time
from bla_inductor.kernels import heuristics

from bla_inductor import kernels
from bla_inductor.ops.layout import key_batch

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
# The largest shared memory a block may ask for; sm_86 and sm_89 run what sm_80 does with less.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTS = [
    (32, bf16, fp32),
    (64, bf16, bf16),
    (64, fp16, fp16),
    (64, fp32, fp32),
    (80, bf16, bf16),
    (128, bf16, bf16),
    (128, fp16, fp16),
    (128, bf16, fp32),
    (256, bf16, bf16),
    (256, fp32, fp32),
]


def _launches(d, dtype, out_dtype, capability, decoupled=False, upcast=False):
    def make(features, dtype=dtype):
        return torch.empty(8, 4096, 16, features, dtype=dtype, device="meta").transpose(1, 2)

    def call():
        q, k, v, out = make(d), make(d), make(d), make(d, out_dtype)
        norms = (make(d), make(d)) if decoupled else (None, None)
        numbers = ("add", 0.5, 0.5, 0.5)
        state, key_sum = kernels.forward(
            out, q, k, v, *norms, key_batch(k, v, None), *numbers, upcast
        )
        grads = [None if t is None else torch.empty_like(t) for t in (q, k, v, *norms)]
        do = torch.empty_like(out)
        kernels.backward(grads, do, q, k, v, *norms, state, key_sum, *numbers, upcast)

    original = heuristics.capability
    heuristics.capability = lambda device: capability // 10
    try:
        return ahead_of_time.record(call)
    finally:
        heuristics.capability = original


def _compile(job):
    return ahead_of_time.compile_for(*job)


@pytest.fixture(scope="module")
def pool():
    os.environ.setdefault(
        "TRITON_DEFAULT_FP_FUSION", "1"
    )  # 3.9 warns about a default that will change
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def _check(pool, jobs):
    for (item, capability), used in zip(jobs, pool.map(_compile, jobs), strict=True):
        label = f"{item.name} sm_{capability} {dict(item.constants)}: {used}"
        assert used.spills == 0, label
        assert used.shared <= SHARED[capability], label


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("d", "dtype", "out_dtype"), POINTS)
def test_no_spills(d, dtype, out_dtype, capability, pool):
    if capability != 90 and (d, dtype) not in ((64, bf16), (128, bf16), (128, fp16)):
        pytest.skip("the grid is thinned: sm_90 has all head dims")
    launches = _launches(d, dtype, out_dtype, capability)
    assert {"state_kernel", "output_kernel"} <= {item.name for item in launches}
    _check(pool, [(item, capability) for item in launches])


def test_no_spills_decoupled(pool):
    _check(pool, [(item, 90) for item in _launches(128, bf16, bf16, 90, decoupled=True)])


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("d", [32, 128])
def test_no_spills_upcast(d, dtype, pool):
    """The user's fp32 contraction of 16-bit tensors, which keeps the state unrounded."""
    _check(pool, [(item, 90) for item in _launches(d, dtype, dtype, 90, upcast=True)])


def test_lengths_are_not_specialised():
    """Another length may differ in its divisibility by 16, and in nothing else that Triton compiles
    for.
    """
    q = torch.empty(2, 3, 1, 64, dtype=bf16, device="meta")
    seen = set()
    for n in (4096, 8192, 12288):
        x = q.expand(2, 3, n, 64)

        def call(x=x):
            kernels.forward(torch.empty_like(x), x, x, x, None, None, (2, 3), "add", 1.0, 1.0, 0.0)

        seen.update(item for item in ahead_of_time.record(call) if item.name == "state_kernel")
    assert len(seen) == 1
