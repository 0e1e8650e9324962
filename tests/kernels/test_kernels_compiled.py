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
ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
RELU = "Piecewise((x, x > 0), (0, True))"
POINTS = [
    (32, bf16, fp32),
    (32, fp16, fp16),
    (40, bf16, bf16),
    (40, fp16, fp16),
    (64, bf16, bf16),
    (64, fp16, fp16),
    (64, fp32, fp32),
    (128, fp32, fp32),
    (72, bf16, bf16),
    (80, bf16, bf16),
    (80, fp16, fp16),
    (96, bf16, bf16),
    (112, fp16, fp16),
    (128, bf16, bf16),
    (128, fp16, fp16),
    (128, bf16, fp32),
    (160, bf16, bf16),
    (256, bf16, bf16),
    (256, fp16, fp16),
    (256, fp32, fp32),
]


def _launches(d, dtype, out_dtype, capability, decoupled=False, upcast=False, phi=ELU1, n=4096):
    def make(features, dtype=dtype):
        return torch.empty(8, n, 16, features, dtype=dtype, device="meta").transpose(1, 2)

    def call():
        q, k, v, out = make(d), make(d), make(d), make(d, out_dtype)
        norms = (make(d), make(d)) if decoupled else (None, None)
        numbers = ((phi, phi, phi, phi), "add", 0.5, 0.5, 0.5)
        state, key_sum = kernels.forward(
            out, q, k, v, *norms, None, key_batch(k, v), *numbers, upcast
        )
        grads = [None if t is None else torch.empty_like(t) for t in (q, k, v, *norms, None)]
        do = torch.empty_like(out)
        kernels.backward(grads, do, q, k, v, *norms, None, state, key_sum, *numbers, upcast)

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


def _spills(item, capability):
    """What spills, and is faster than anything tried that does not, in compiled graphs, where
    strides are numbers (H100; of the copy bandwidth): the query pass in two pieces, 46 % at D = 80
    and 42 at 72, padded to 128 without spills 41 and 36; at D = 72 the output, 75 against 53 %, and
    the key pass, 62 against 46; the query pass at D = 40, 59 against 48 %; the key pass of tf32 in
    64, 92 against 60 %. And Triton 3.6 has four registers too few for fp32
    in 64 features, two too few for 256 features, and for tf32 in 32.
    """
    constants = dict(item.constants)
    kernel = item.name.removesuffix("_kernel")
    precision, D = constants.get("PRECISION"), constants.get("D")
    anywhere = {
        ("query_pass", "native", 40): 136,
        ("output", "native", 72): 8,
        ("query_pass", "native", 72): 856,
        ("key_pass", "native", 72): 208,
        ("query_pass", "native", 80): 432,
        ("key_pass", "tf32", 64): 144,
    }
    in_36 = {
        ("query_pass", "parts", 64): 16,
        ("query_pass", "native", 256): 8,
        ("query_pass", "tf32", 32): 8,
    }
    if capability != 90:
        return 0
    key = (kernel, precision, D)
    return anywhere.get(key, in_36.get(key, 0) if ahead_of_time.TRITON < (3, 7) else 0)


def _check(pool, jobs):
    for (item, capability), used in zip(jobs, pool.map(_compile, jobs), strict=True):
        label = f"{item.name} sm_{capability} {dict(item.constants)}: {used}"
        assert used.spills <= _spills(item, capability), label
        assert used.shared <= SHARED[capability], label


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("d", "dtype", "out_dtype"), POINTS)
def test_no_spills(d, dtype, out_dtype, capability, pool):
    if capability != 90 and (d, dtype) not in ((64, bf16), (64, fp32), (128, bf16), (128, fp16)):
        pytest.skip("the grid is thinned: sm_90 has all head dims")
    phi = ELU1 if dtype == out_dtype else RELU  # the user's upcast comes with maps exact in 16 bits
    launches = _launches(d, dtype, out_dtype, capability, phi=phi)
    assert {"state_kernel", "output_kernel"} <= {item.name for item in launches}
    _check(pool, [(item, capability) for item in launches])


def test_no_spills_decoupled(pool):
    _check(pool, [(item, 90) for item in _launches(128, bf16, bf16, 90, decoupled=True)])


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_no_spills_upcast(d, dtype, pool):
    """The user's fp32 contraction of 16-bit tensors, which keeps the state unrounded."""
    _check(pool, [(item, 90) for item in _launches(d, dtype, dtype, 90, upcast=True, phi=RELU)])


@pytest.mark.parametrize("d", [32, 64])
def test_no_spills_in_tf32(d, pool):
    torch.set_float32_matmul_precision("high")
    try:
        launches = _launches(d, fp32, fp32, 90)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(dict(item.constants).get("PRECISION", "tf32") == "tf32" for item in launches)
    _check(pool, [(item, 90) for item in launches])


@pytest.mark.parametrize(("d", "dtype", "out_dtype"), [(64, bf16, bf16), (32, bf16, fp32)])
def test_no_spills_in_one_launch(d, dtype, out_dtype, pool):
    for n in (256, 16 * d):
        phi = ELU1 if dtype == out_dtype else RELU
        launches = _launches(d, dtype, out_dtype, 90, phi=phi, n=n)
        assert any(item.name.startswith("short") for item in launches)
        _check(pool, [(item, 90) for item in launches])


def test_lengths_are_not_specialised():
    """Another length may differ in its divisibility by 16, and in nothing else that Triton compiles
    for: a new one is neither tuned nor compiled again.
    """
    seen = set()
    for n in (4096, 8192, 12288, 65536):
        seen.update(_launches(64, bf16, bf16, 90, n=n))
    assert sorted(item.name for item in seen) == [
        "key_pass_kernel",
        "output_kernel",
        "query_pass_kernel",
        "state_kernel",
        "sum_splits",
    ]
