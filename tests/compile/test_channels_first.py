"""Operands whose rows, not their features, are contiguous (channels first, as of a convolution):
read where they are, several rows at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from bla_inductor import cost, lowering
from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite
from tests.compile import nogpu
from tests.compile.test_codegen import LONG, SHORT, B, D, H, code, merged
from tests.compile.test_codegen_layouts import image, loops_and_templates, of_image, written
from tests.compile.test_codegen_values import RELU, Case, Viewed, assert_equal, formula
from tests.compile.test_codegen_values import of_image as of_16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)
fp16 = torch.float16
MAPS = formula(q_map=RELU, k_map=RELU)


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "READS_CHANNELS_FIRST", True)
    lowering.register()


def groups(text: str) -> set[int]:
    """How many rows at a time the kernels of a module take."""
    return {int(g) for g in re.findall(r"\bGROUP(?:=| : tl\.constexpr = )(\d+)", text)}


@pytest.mark.parametrize(("n", "kernels"), [(LONG, 3), (SHORT, 1)])
def test_nothing_is_copied(n: int, kernels: int) -> None:
    text = code(lambda q, k, v: merged(*map(of_image, (q, k, v))), *[image(n)] * 3)
    assert loops_and_templates(text) == (0, kernels)
    assert groups(text) == {8}
    assert "KEY_GROUP : tl.constexpr = 8" in text or kernels == 3


@pytest.mark.parametrize(("n", "group", "loops"), [(4100, 4, 0), (4098, 1, 3), (4097, 1, 3)])
def test_rows_are_read_8_bytes_at_a_time_or_copied(n: int, group: int, loops: int) -> None:
    text = code(lambda q, k, v: merged(*map(of_image, (q, k, v))), *[image(n)] * 3)
    assert loops_and_templates(text) == (loops, 3)
    assert groups(text) == {group}


def test_wide_heads_are_copied() -> None:
    """Their kernels read by descriptors."""

    def function(q, k, v):
        return merged(*(x.unflatten(1, (H, 256)).mT for x in (q, k, v)))

    text = code(function, *[(B, H * 256, LONG)] * 3)
    assert loops_and_templates(text)[0] == 3
    assert len(written(text, (B, H, LONG, 256))) == 3


def test_a_result_that_lies_so_is_stored_many_rows_at_a_time() -> None:
    def function(q, k, v):
        return torch.ops.bla.linear_attention(q, k, v, **formula(), out_order=[0, 1, 3, 2])

    text = code(function, *[(B, H, LONG, D)] * 3)
    assert "OUT_GROUP : tl.constexpr = 8" in text
    assert "OUT_GROUP : tl.constexpr = 1" in code(function, *[(B, H, 4097, D)] * 3)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """The memory of `of_image`, read as features that are contiguous."""
    return x.unflatten(1, (-1, 16)).flatten(2).unflatten(2, (-1, 16))


class Mixed(Viewed):
    """q, k, v and do as views of their own."""

    def __init__(self, shape: tuple[int, ...], *views: Any, keys: int = 0) -> None:
        super().__init__(shape, of_16, dtype=fp16)
        self.views, self.keywords = views, MAPS
        if keys:
            self.shapes[1:3] = [(*shape[:2], keys)] * 2

    def function(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        viewed = (view(x) for view, x in zip(self.views, tensors, strict=True))
        return [x.contiguous() for x in Case.function(self, *viewed)]


def of(shape: tuple[int, ...], dtype: torch.dtype, **keywords: Any) -> Viewed:
    case = Viewed(shape, of_16, dtype=dtype)
    case.keywords = keywords or MAPS
    return case


def test_values(tmp_path: Path) -> None:
    """A length that no tile divides, by passes and in one launch. Where the rows of the keys come
    in no groups, those of the queries may not decide for both.
    """
    cases = {
        "fp16": of((2, 48, 296), fp16),
        "fp16, 8 bytes": of((2, 48, 300), fp16),
        "fp16, no normaliser": of((2, 48, 296), fp16, scale=0.01),
        "fp16, short": of((2, 48, 40), fp16),
        "fp32, softmax": of((2, 48, 298), torch.float32, q_map="softmax", k_map="softmax"),
        "q alone": Mixed((2, 48, 296), of_16, as_rows, as_rows, as_rows),
        "v and do": Mixed((2, 48, 40), as_rows, as_rows, of_16, of_16),
        "odd keys": Mixed((2, 48, 40), of_16, as_rows, as_rows, as_rows, keys=41),
    }
    texts = {name: nogpu.code(case.function, case.make) for name, case in cases.items()}
    assert all(max(groups(text)) > 1 for text in texts.values())
    assert_equal(cases, tmp_path)


def rala(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(1, (4, 32)).mT for t in (q, k, v))
    q, k = q.relu(), k.relu()
    z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    return (q * cos) @ ((k * cos).mT @ v) / z


@pytest.mark.parametrize(
    ("reads", "tokens", "pays"), [(True, 256, True), (False, 256, False), (True, 257, False)]
)
def test_what_is_read_where_it_is_does_not_count_as_copied(monkeypatch, reads, tokens, pays):
    monkeypatch.setattr(cost, "READS_CHANNELS_FIRST", reads)
    graph = fx.symbolic_trace(rala)
    shapes = [(2, 128, tokens)] * 3 + [(tokens, 32)]
    with FakeTensorMode():
        values = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        result = torch.empty(2, 4, tokens, 32, device="cuda", dtype=torch.bfloat16)
    for value in (*values[:3], result):
        value.requires_grad_(True)
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["example_value"] = value
    (output,) = graph.graph.find_nodes(op="output")
    output.args[0].meta["example_value"] = result
    report = rewrite(graph, values, Options())
    assert len(report.matches) == pays
    assert any("channels apart" in refusal.reason for refusal in report.refusals) == (not pays)
