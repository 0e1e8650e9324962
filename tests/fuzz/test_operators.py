"""Any call of the operators gives what the formula gives in fp64, whatever the shapes, strides,
dtypes and options.

Small and the same every time in CI; `make fuzz SECONDS=600` goes on with new calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bla_inductor.ops.packed  # noqa: F401  (registers its operator)
from tests.fuzz.budget import assert_no_less_accurate, fuzz
from tests.fuzz.operands import Call, calls, needed_gradients, plain_of
from tests.fuzz.piecewise_operands import (
    PiecewiseCall,
    assert_selected,
    formula_of,
    piecewise_calls,
)

ops = torch.ops.bla
TINY, NARROW = (3, 1, 2), (2, 1, 3)


def leaves_of(tensors: list[Any], needs: tuple[bool, ...]) -> list[Any]:
    """The same memory, each requiring a gradient if it is needed."""
    return [
        t if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


@fuzz(150)
@given(calls())
def test_values_and_gradients(call: Call) -> None:
    naive, exact = plain_of(call), plain_of(call, wide=True)
    operands = call.views(call.bases())
    do = call.gradient()
    leaves = leaves_of(operands, call.needs)
    out = ops.linear_attention(*leaves, **call.options())
    order = call.out_order or tuple(range(out.dim()))
    assert out.permute(order).is_contiguous()
    got = {"out": out, **needed_gradients(out, leaves, do)}
    assert_no_less_accurate(got, naive, exact, operands, call.dtype, repr(call))


@fuzz(30)
@given(calls(), st.data())
def test_gradients_in_one_buffer(call: Call, data: st.DataObject) -> None:
    q, k, v, *others = call.views(call.bases())
    options = call.options()
    do, forward = call.gradient(), ops.linear_attention_forward
    _, state, key_sum = forward(q, k, v, *others, **options)
    formula = {n: x for n, x in options.items() if n not in ("out_dtype", "out_order")}
    arguments = (do, q, k, v, *others, state, key_sum)
    apart = ops.linear_attention_backward(*arguments, **formula, needs=call.needs)
    places, end = [], 0
    for i, need in enumerate(call.needs[:5]):
        if need and data.draw(st.booleans(), label="in the buffer"):
            shape = call.shapes[i]
            order = data.draw(st.permutations(list(range(len(shape)))))
            end += data.draw(st.integers(0, 3), label="gap")
            strides = [
                prod(shape[d] for d in order[order.index(dim) + 1 :]) for dim in range(len(shape))
            ]
            places += [i, end, *strides]
            end += prod(shape)
    packed, *rest = ops.linear_attention_backward_packed(
        *arguments, **formula, needs=call.needs, size=[end], places=places
    )
    assert packed.shape == (end,)
    width = 2 + q.dim()
    placed = {places[i]: places[i + 1 : i + width] for i in range(0, len(places), width)}
    for i, expected in enumerate(apart):
        if i in placed:
            offset, *strides = placed[i]
            assert rest[i].shape == (0,)
            assert torch.equal(packed.as_strided(expected.shape, strides, offset), expected)
        else:
            assert torch.equal(rest[i], expected)


@fuzz(30)
@given(piecewise_calls())
def test_piecewise(call: PiecewiseCall) -> None:
    operands = call.operands()
    leaves = [x.detach().requires_grad_(need) for x, need in zip(operands, call.needs, strict=True)]
    numbers = {"density": call.density, "block_size": call.block_size, "scale": call.scale}
    _, chosen = ops.piecewise_sparse_attention_forward(*operands, **numbers)
    assert_selected(chosen, call, operands)
    order = call.out_order or tuple(range(len(call.out_shape)))
    out = ops.piecewise_sparse_attention(
        *leaves, **numbers, approximate_training=True, out_order=list(order)
    )
    assert out.permute(order).is_contiguous()
    wanted = {n: x for n, x in zip(("dq", "dk", "dv"), leaves, strict=True) if x.requires_grad}
    got = {"out": out.detach()}
    if wanted:
        grads = torch.autograd.grad(out, list(wanted.values()), call.gradient())
        got |= dict(zip(wanted, grads, strict=True))
    assert_no_less_accurate(
        got, formula_of(call, chosen, True), formula_of(call, chosen, True, wide=True), operands,
        call.dtype, repr(call),
    )  # fmt: skip


@fuzz(3)
@given(calls(lengths=TINY, channels=NARROW))
def test_registrations(call: Call) -> None:
    operands, options = call.views(call.bases()), call.options()
    torch.library.opcheck(
        ops.linear_attention.default, tuple(leaves_of(operands, call.needs)), options
    )
    arguments = tuple(x if x is None else x.detach() for x in operands)
    torch.library.opcheck(ops.linear_attention_forward.default, arguments, options)
    _, state, key_sum = ops.linear_attention_forward(*arguments, **options)
    formula = {n: x for n, x in options.items() if n not in ("out_dtype", "out_order")}
    torch.library.opcheck(
        ops.linear_attention_backward.default,
        (call.gradient(), *arguments, state, key_sum),
        {**formula, "needs": list(call.needs)},
    )


@fuzz(24)
@given(calls(dtypes=(torch.float64,), lengths=TINY, channels=NARROW, smooth=True))
def test_first_and_second_derivatives(call: Call) -> None:
    bases = leaves_of(call.bases(), call.needs)
    wanted = [x for x in bases if x is not None and x.requires_grad and x.dtype == torch.float64]
    if not wanted:
        return

    def function(*given: Tensor) -> Tensor:
        values = iter(given)
        full = [next(values) if any(x is y for y in wanted) else x for x in bases]
        return ops.linear_attention(*call.views(full), **call.options())

    assert torch.autograd.gradcheck(function, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, wanted, fast_mode=True)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    suite = Path(__file__).with_name("interpreted_operators.py")
    options = ("-q", "--timeout=0", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
