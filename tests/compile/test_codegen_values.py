"""What the kernels that Inductor generates compute, in Triton's interpreter, and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bla_inductor.kernels import heuristics, large, short_heuristics

from bla_inductor import compat, lowering
from bla_inductor.templates import arguments
from tests.compile import nogpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)

bla = torch.ops.bla
RELU = "Piecewise((x, x > 0), (0, True))"
SQUARE = "Piecewise((x**2, x > 0), (0, True))"
TOKENS_LAST = [0, 2, 1, 3]


@pytest.fixture(autouse=True)
def _registered() -> None:
    lowering.register()


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

    def save(self, file: Path, inference: bool = False, kept: int = 0) -> None:
        inputs = [torch.randn(s).to(self.dtype) for s in self.shapes]
        text = nogpu.code(self.function, self.make, inference, kept)
        assert "torch.ops.bla" not in text
        expected = self.function(*inputs)
        torch.save({"code": text, "inputs": inputs, "expected": expected, "kept": kept}, file)


class Viewed(Case):
    """q, k, v and do are views of tensors of one shape, after `compute` if they are not inputs."""

    def __init__(self, shape, view, compute=None, dtype=torch.float32, joined=False):
        super().__init__([shape] * 3, formula(), dtype, joined=joined)
        self.view, self.compute = view, compute or (lambda x: x)

    def function(self, *tensors):
        results = super().function(*(self.view(self.compute(x)) for x in tensors))
        return [x.contiguous() for x in results]


class KeptOtherwise(Case):
    """A backward whose statistics Inductor has kept with their heads innermost."""

    def __init__(self, shapes):
        super().__init__(shapes, formula(normalizer="clamp", eps=3.0))
        *batch, _, D = self.shapes[0]
        self.shapes += [swapped(*batch, D, D), swapped(*batch, D)]

    def function(self, *tensors):
        q, k, v, do, state, key_sum = tensors
        kept = (state.transpose(1, -1), key_sum.transpose(1, -1))
        inputs, needs = (q, k, v, None, None, None), [True] * 3 + [False] * 3
        grads = bla.linear_attention_backward(do, *inputs, *kept, **self.keywords, needs=needs)
        return list(grads[:3])


class Between(Case):
    """A forward between convolutions, and what it keeps: q, a k that is computed, v, statistics."""

    def __init__(self, channels):
        super().__init__(same(64, 2, 3), formula(normalizer="clamp", eps=3.0))
        self.shapes = [(2, channels, 8, 8), (3 * 48, channels, 1, 1), (channels, 48, 1, 1)]

    def function(self, x, weight, last):
        q, k, v = F.conv2d(x, weight).unflatten(1, (3, 3, 16)).flatten(4).unbind(1)
        q, k, v = q.mT, k.sigmoid(), v.mT
        out, *statistics = bla.linear_attention_forward(
            q, k.mT, v, **self.keywords, out_order=[0, 1, 3, 2]
        )
        image = out.mT.reshape(2, 48, 8, 8)
        return [F.conv2d(image, last), q, k, v, *statistics]

    def save(self, file: Path, inference: bool = False) -> None:
        super().save(file, inference, kept=5)


def swapped(*sizes: int) -> tuple[int, ...]:
    """With dim 1 last."""
    return sizes[0], sizes[-1], *sizes[2:-1], sizes[1]


class Image(Case):
    """The result as an image (B, C, 4, N / 4), which a convolution reads, in inference."""

    def __init__(self, shapes):
        super().__init__(shapes, formula())
        *_, H, N, C = shapes[2]
        self.shapes[-1:] = [(1, H * C, 4, N // 4), (8, H * C, 1, 1)]

    def function(self, q, k, v, x, weight):
        out = bla.linear_attention(q, k, v, **self.keywords, out_order=[0, 1, 3, 2])
        image = out.mT.reshape(q.shape[0], -1, *x.shape[2:])
        return [torch.conv2d(i, weight).flatten(1) + 1 for i in (image, image * x)]

    def save(self, file: Path, inference: bool = True) -> None:
        super().save(file, inference)


def of_image(x: torch.Tensor) -> torch.Tensor:
    """Channels before tokens."""
    return x.unflatten(1, (-1, 16)).mT


def windows(x: torch.Tensor) -> torch.Tensor:
    """Batch dims of three unrelated strides."""
    return x.permute(3, 2, 0, 1, 4)


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x.mT.unsqueeze(1).expand(-1, 3, -1, -1)


def same(n: int, *batch: int) -> list[tuple[int, ...]]:
    return [(*batch, n, 16)] * 3


fp16 = torch.float16
CASES = {
    "short": Case(same(40, 2, 3), formula(q_map=RELU, k_map=RELU), fp16),
    "by splits": Case(same(300, 2, 3), formula(), order=TOKENS_LAST),
    # 6144 numbers: not of those for which Inductor leaves out its loops' masks
    "whole tiles": Case(same(64, 2, 3), formula(), order=TOKENS_LAST),
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
    "channels first": Viewed((2, 48, 40), of_image),
    "channels first, computed": Viewed((2, 48, 300), of_image, lambda x: x * x.sigmoid()),
    "channels first, joined": Viewed((2, 48, 40), of_image, joined=True),
    "three strides": Viewed((3, 20, 2, 4, 16), windows),
    "three strides, by splits": Viewed((3, 300, 2, 2, 16), windows),
    "channels first, repeated": Viewed((2, 16, 40), repeated),
    "statistics kept otherwise": KeptOtherwise(same(40, 2, 3)),
    "statistics kept otherwise, by passes": KeptOtherwise(same(300, 2, 3)),
    "statistics kept otherwise, three batch dims": KeptOtherwise(same(40, 2, 2, 3)),
    "between convolutions": Between(16),
    "between convolutions, channels last": Between(80),
    "image": Image(same(40, 2, 3)),
    "image, by splits": Image(same(300, 2, 3)),
    "softmax features": Case(same(40, 2, 3), {"q_map": "softmax", "k_map": "softmax"}),
}


def assert_equal(cases: dict[str, Case], folder: Path) -> None:
    """Every result of every case equals the operators' plain path."""
    files = []
    for name, case in cases.items():
        files.append(folder / f"{name.replace(' ', '_')}.pt")
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
    assert done.stdout.count("equal") == len(cases)


def test_values_in_the_interpreter(tmp_path: Path) -> None:
    assert_equal(CASES, tmp_path)


def test_values_of_tiles_by_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows and columns beyond the last."""
    monkeypatch.setattr(large, "MIB", 0)
    for name in ("short_forward_parts", "short_backward_parts"):
        monkeypatch.setattr(short_heuristics, name, lambda *_: 0)
    maps = formula(q_map=RELU, k_map=RELU)
    cases = {
        "64": Case([(1, 2, 150, 64)] * 3, maps, fp16, order=TOKENS_LAST),
        "72": Case([(1, 1, 200, 72)] * 3, maps, fp16, symbolic=(200,)),
    }
    assert_equal(cases, tmp_path)
    text = nogpu.code(cases["72"].function, cases["72"].make)
    assert text.count("TMA=True") == 1  # the state; in fp16 the query pass has pointers
    assert "TMA : tl.constexpr = True" in text  # the output


@pytest.mark.parametrize("descriptors", [False, True])
def test_values_of_wide_heads(tmp_path: Path, monkeypatch, descriptors: bool) -> None:
    """In fp16, since the interpreter's bf16 is wrong."""
    monkeypatch.setattr(large, "WHOLE_IN", (fp16,))
    monkeypatch.setattr(large, "MIB", 0 if descriptors else 1 << 40)
    large._large.cache_clear()
    maps = formula(q_map=RELU, k_map=RELU)
    wide = [(1, 2, 70, 144)] * 3
    cases = {
        "as they are": Case(wide, maps, fp16, order=TOKENS_LAST),
        "masked": Case([*wide, (1, 1, 70)], maps, fp16, weight="mask", symbolic=(70,)),
        "no normaliser": Case(wide, {"scale": 0.01}, fp16),
        "one-headed": Case([wide[0], (1, 1, 50, 144), (1, 1, 50, 144)], maps, fp16, joined=False),
    }
    try:
        assert_equal(cases, tmp_path)
        text = nogpu.code(cases["as they are"].function, cases["as they are"].make)
    finally:
        large._large.cache_clear()
    # State, dstate, query pass, dv and dk; the output has an epilogue.
    assert text.count("TMA=True") == 5 * descriptors


def test_without_memory_for_them_there_are_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "MIB", 0)
    case = Case([(1, 2, 5000, 72)] * 3, formula(q_map=RELU, k_map=RELU), fp16)
    monkeypatch.setattr(compat, "gives_kernels_memory", lambda: False)
    assert "TMA=True" not in nogpu.code(case.function, case.make)


def test_generated_cpp_has_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not give kernels the memory that they take."""
    graph = types.SimpleNamespace(cpp_wrapper=True)
    monkeypatch.setattr(arguments, "V", types.SimpleNamespace(graph=graph))
    tile = heuristics.state_tile(64, 64, 64, "native", 9)
    assert arguments.for_large("state", tile, (64, 64, 64), "native", 1 << 30, ()) is tile
