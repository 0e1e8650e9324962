"""What Inductor generates for the operators on CUDA, without a GPU: which kernels, what is fused
into them, what is copied; and, in Triton's interpreter, what they compute.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bla_inductor import lowering, lowering_cuda, stamp
from tests.compile import nogpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)

bla = torch.ops.bla
ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
RELU = "Piecewise((x, x > 0), (0, True))"
SQUARE = "Piecewise((x**2, x > 0), (0, True))"
FORMULA = {"q_map": ELU1, "k_map": ELU1, "normalizer": "add", "eps": 1e-6}
TOKENS_LAST = [0, 2, 1, 3]
B, H, D = 2, 4, 64
LONG, SHORT = 4096, 128


@pytest.fixture(autouse=True)
def _registered() -> None:
    lowering.register()


def code(function: Callable[..., Any], *shapes: Sequence[int], **settings: Any) -> str:
    dtype = settings.pop("dtype", torch.bfloat16)
    return nogpu.code(
        function, lambda make: [make.tensor(*s, dtype=dtype) for s in shapes], **settings
    )


def heads(n: int) -> tuple[int, ...]:
    return (B, H, n, D)


def names(text: str) -> list[str]:
    return list(nogpu.kernels(text))


def assert_fused(text: str, kernels: int) -> None:
    """So many templates, and nothing else: no call, no copy, no pass of its own for anything."""
    found = names(text)
    assert "torch.ops.bla" not in text
    assert "extern_kernels." not in text
    assert [n for n in found if not n.startswith("triton_tem_")] == []
    assert text.count(".run(") == kernels


def merged(q, k, v, **formula):
    out = bla.linear_attention(q, k, v, **FORMULA, **formula, out_order=TOKENS_LAST)
    return out.transpose(1, 2).flatten(2)


def gradients(q, k, v, do):
    _, state, key_sum = bla.linear_attention_forward(q, k, v, **FORMULA)
    tensors = (q, k, v, None, None, None, state, key_sum)
    needs = [True] * 3 + [False] * 3
    return bla.linear_attention_backward(do, *tensors, **FORMULA, needs=needs)[:3]


EPILOGUES = {
    "residual": lambda o, x, gate, bias: o + x,
    "gate": lambda o, x, gate, bias: o * torch.sigmoid(gate),
    "bias": lambda o, x, gate, bias: F.gelu(o + bias),
    "cast": lambda o, x, gate, bias: o.float() * 2,
    "images": lambda o, x, gate, bias: o.unflatten(1, (-1, 16)) + x.unflatten(1, (-1, 16)),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize(("n", "kernels"), [(LONG, 3), (SHORT, 1)])
def test_what_follows_is_computed_in_the_output_kernel(name: str, n: int, kernels: int) -> None:
    def function(q, k, v, x, gate, bias):
        return EPILOGUES[name](merged(q, k, v), x, gate, bias)

    text = code(function, *[heads(n)] * 3, (B, n, H * D), (B, 1, H * D), (H * D,))
    assert_fused(text, kernels)
    assert text.count(f"empty_strided_cuda(({B}, {n},") <= 1  # the result, and no intermediate


def test_the_feature_map_is_inside_and_the_text_is_the_kernels() -> None:
    sources = list(nogpu.kernels(code(merged, *[heads(LONG)] * 3)).values())
    state, add, output = sources
    assert "from bla_inductor.kernels.state import state_kernel" in state
    assert f"feature_map({ELU1!r}, torch.bfloat16).forward" in state
    assert "sum_splits(" in add
    assert "from bla_inductor.kernels.output import output_tile" in output
    assert f"feature_map({ELU1!r}, torch.bfloat16).forward" in output
    assert "triton_poi" not in "".join(sources)


@pytest.mark.parametrize(("n", "kernels"), [(LONG, 5), (SHORT, 2)])
def test_the_backward_writes_every_gradient_itself(n: int, kernels: int) -> None:
    """State and its sum; query pass, its sum, key pass. The forward's output is not computed."""
    text = code(gradients, *[heads(n)] * 4)
    assert_fused(text, kernels)
    assert text.count(f"empty_strided_cuda({heads(n)}") == 3


def test_views_of_one_projection_are_read_in_place() -> None:
    def function(qkv):
        q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
        return merged(q, k, v)

    text = code(function, (B, LONG, 3 * H * D))
    assert_fused(text, 3)
    state = next(iter(nogpu.kernels(text).values()))
    assert f"K = arg_V + {H * D}" in state
    assert f", {3 * H * D}, 1," in state


def test_one_headed_keys_are_not_expanded() -> None:
    text = code(merged, heads(LONG), (B, 1, LONG, D), (B, 1, LONG, D))
    assert_fused(text, 3)
    assert f"empty_strided_cuda(({B}, 1, {D}, {D})" in text


def test_symbolic_sizes_and_numbers() -> None:
    """One graph for every batch and length: grid, splits and 1/n are computed from the sizes."""

    def function(q, k, v):
        return merged(q, k, v, scale=1 / k.shape[-2])

    def make(make: nogpu.Make) -> list[torch.Tensor]:
        b, n = make.size(B), make.size(LONG)
        return [make.tensor(b, H, n, D, dtype=torch.bfloat16) for _ in range(3)]

    text = nogpu.code(function, make)
    assert_fused(text, 3)
    output = list(nogpu.kernels(text).values())[-1]
    assert re.search(r"scale = tl.cast\(\(1 / \(ks\d\)\), tl.float32\)", output)
    launches = [line for line in text.splitlines() if ".run(" in line]
    assert all(re.search(r"s\d+", line) for line in launches)
    assert str(LONG) not in "".join(launches)


def test_16_bit_with_a_float32_result_keeps_the_order_of_its_sums() -> None:
    """A length that the compiler knows would let it merge what must be added up apart."""

    def function(q, k, v):
        return bla.linear_attention(q, k, v, out_dtype=torch.float32)

    text = code(function, *[heads(LONG)] * 3)
    assert_fused(text, 3)
    assert "EXACT=True" in text
    assert f"(({LONG}) + tl.program_id(2))" in text


def test_max_autotune_compiles() -> None:
    text = code(merged, *[heads(SHORT)] * 3, max_autotune=True)
    assert_fused(text, 1)


def wide(q, k, v, do):
    return gradients(q, k, v, do)


def test_what_the_templates_do_not_cover_is_called(caplog) -> None:
    shape = (B, H, SHORT, 160)
    lowering_cuda._reported.clear()
    with caplog.at_level(logging.INFO, logger="bla_inductor"):
        for _ in range(2):
            text = code(wide, *[shape] * 4)
    assert "torch.ops.bla.linear_attention_backward.default(" in text
    assert "torch.ops.bla.linear_attention_forward" not in text
    (record,) = (r for r in caplog.records if "is called instead of fused" in r.getMessage())
    assert record.levelno == logging.INFO
    assert "head dims 160, 160" in record.getMessage()


def test_a_failure_costs_the_fusion_and_not_the_compilation(monkeypatch, caplog) -> None:
    def fail(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("bla_inductor.templates.forward.apply_state", fail)
    lowering_cuda._reported.clear()
    with caplog.at_level(logging.INFO, logger="bla_inductor"):
        text = code(merged, *[heads(LONG)] * 3)
    assert text.count("torch.ops.bla.linear_attention.default(") == 1
    assert "triton_tem" not in text
    (record,) = (r for r in caplog.records if "is called instead of fused" in r.getMessage())
    assert record.levelno == logging.WARNING
    assert "ZeroDivisionError: on purpose" in record.getMessage()


@pytest.mark.parametrize("file", ["kernels/output.py", "bla_inductor/templates/output.py"])
def test_inductors_caches_miss_when_a_kernel_or_a_template_changes(monkeypatch, file: str) -> None:
    before = stamp.source_hash()
    read = pathlib.Path.read_bytes

    def changed(path: pathlib.Path) -> bytes:
        return read(path) + (b"#" if path.as_posix().endswith(file) else b"")

    monkeypatch.setattr(pathlib.Path, "read_bytes", changed)
    assert stamp.source_hash.__wrapped__() != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_compile_for_sm_90(dtype: torch.dtype) -> None:
    def function(q, k, v, do, x):
        return F.gelu(merged(q, k, v) + x), *gradients(q, k, v, do)

    text = code(function, *[heads(SHORT)] * 4, (B, SHORT, H * D), dtype=dtype)
    for name, source in nogpu.kernels(text).items():
        ptx = nogpu.assembled(name, source).asm["ptx"]
        assert "mma" in ptx
        assert ".local" not in ptx


def formula(**keywords: Any) -> dict[str, Any]:
    return {"q_map": SQUARE, "k_map": SQUARE, "normalizer": "add", "eps": 0.5, **keywords}


class Case:
    """Inputs and formula for a forward and a backward whose every result is compared.

    shapes: q, k, v, then q_norm and k_norm, then the key weight if `weight`. symbolic: sizes that
    are symbols when the code is generated, with another hint than the size it then runs at. joined:
    dq, dk, dv are one tensor, as the gradient of a projection to all three.
    """

    def __init__(
        self,
        shapes,
        keywords,
        dtype=torch.float32,
        weight="",
        order=None,
        symbolic=(),
        joined=False,
    ):
        self.shapes, self.keywords, self.dtype = list(shapes), keywords, dtype
        self.joined = joined
        self.weight, self.order, self.symbolic = weight, order, symbolic
        q, v = self.shapes[0], self.shapes[2]
        self.shapes.append((*q[:-1], v[-1]))

    def function(self, *tensors):
        *tensors, do = tensors
        keywords = dict(self.keywords)
        weight = tensors.pop() if self.weight else None
        if self.weight == "mask":
            weight = weight > 0
        q, k, v, q_norm, k_norm = [*tensors, None, None][:5]
        if self.symbolic:
            keywords["scale"] = 1 / k.shape[-2]
        inputs = (q, k, v, q_norm, k_norm, weight)
        out, state, key_sum = bla.linear_attention_forward(
            *inputs, **keywords, out_order=self.order
        )
        needs = [True] * 3 + [q_norm is not None] * 2 + [self.weight == "float"]
        grads = bla.linear_attention_backward(do, *inputs, state, key_sum, **keywords, needs=needs)
        wanted = [g for g, need in zip(grads, needs, strict=True) if need]
        if self.joined:
            wanted[:3] = [torch.stack(wanted[:3]).permute(1, 3, 0, 2, 4).flatten(2)]
        return [out, state, *([key_sum] if key_sum.numel() else []), *wanted]

    def make(self, make: nogpu.Make) -> list[torch.Tensor]:
        symbols = {size: make.size(size + 1) for size in self.symbolic}
        return [
            make.tensor(*(symbols.get(s, s) for s in shape), dtype=self.dtype)
            for shape in self.shapes
        ]

    def save(self, file: Path) -> None:
        inputs = [torch.randn(s).to(self.dtype) for s in self.shapes]
        text = nogpu.code(self.function, self.make)
        assert "torch.ops.bla" not in text
        torch.save({"code": text, "inputs": inputs, "expected": self.function(*inputs)}, file)


def same(n: int, *batch: int) -> list[tuple[int, ...]]:
    return [(*batch, n, 16)] * 3


fp16 = torch.float16
CASES = {
    "short": Case(same(40, 2, 3), formula(q_map=RELU, k_map=RELU), fp16),
    "by splits": Case(same(300, 2, 3), formula(), order=TOKENS_LAST),
    "one-headed": Case([(2, 4, 70, 16), (2, 1, 50, 16), (2, 1, 50, 48)], formula()),
    "decoupled": Case(
        [*same(40, 2), *[(2, 40, 32)] * 2], formula(q_norm_map=RELU, k_norm_map=RELU)
    ),
    "weighted": Case([*same(40, 2, 3), (2, 3, 40)], formula(), weight="float"),
    "masked": Case(
        [*same(40, 2, 3), (2, 1, 40)], formula(q_map=RELU, k_map=RELU), fp16, weight="mask"
    ),
    "no normaliser": Case(same(40, 2, 3), {"scale": 0.01}, order=[2, 0, 1, 3]),
    "clamped": Case(same(40, 2, 3), formula(normalizer="clamp", eps=3.0, norm_scale=0.1)),
    "unfused query pass": Case([(1, 2, 40, 64)] * 3, formula()),
    "symbolic": Case(same(300, 2, 3), formula(), order=TOKENS_LAST, symbolic=(2, 300)),
    "no batch": Case(same(40), formula()),
    "joined": Case(same(40, 2, 3), formula(q_map=RELU, k_map=RELU), fp16, joined=True),
    "joined, by passes": Case(same(300, 2, 3), formula(), joined=True),
    "three batch dims": Case(same(20, 2, 2, 3), formula()),
    "softmax features": Case(same(40, 2, 3), {"q_map": "softmax", "k_map": "softmax"}),
}


def test_values_in_the_interpreter(tmp_path: Path) -> None:
    """Every result of every case equals the operators' plain path."""
    files = []
    for name, case in CASES.items():
        files.append(tmp_path / f"{name.replace(' ', '_')}.pt")
        case.save(files[-1])
    program = Path(__file__).with_name("interpreted_graphs.py")
    done = subprocess.run(
        [sys.executable, str(program), *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("equal") == len(CASES)
