"""What Inductor generates for the operators on CUDA, without a GPU: which kernels, what is fused
into them, what is copied. What they compute is in test_codegen_values.py.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bla_inductor.kernels import heuristics

from bla_inductor import lowering, lowering_cuda, stamp
from tests.compile import nogpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)

bla = torch.ops.bla
ELU1 = "Piecewise((x + 1, x > 0), (exp(x), True))"
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


def gradients(q, k, v, do, orders=None):
    _, state, key_sum = bla.linear_attention_forward(q, k, v, **FORMULA)
    tensors = (q, k, v, None, None, None, state, key_sum)
    needs = [True] * 3 + [False] * 3
    grads = bla.linear_attention_backward(do, *tensors, **FORMULA, needs=needs, orders=orders)
    return grads[:3]


# o: tokens by channels, as is x; gate and bias: one entry a channel; image: what a convolution of
# the values gives (LePE), channels first. Before them come the output's transpose and reshape.
EPILOGUES = {
    "nothing": lambda o, x, gate, bias, image: o,
    "residual": lambda o, x, gate, bias, image: o + x,
    "gate": lambda o, x, gate, bias, image: o * torch.sigmoid(gate),
    "gate of tokens": lambda o, x, gate, bias, image: o * F.silu(x),
    "position": lambda o, x, gate, bias, image: o + image.flatten(2).mT,
    "activation": lambda o, x, gate, bias, image: F.gelu(o + bias),
    "cast": lambda o, x, gate, bias, image: o.float() * 2,
    "images": lambda o, x, gate, bias, image: o.unflatten(1, (-1, 16)) + x.unflatten(1, (-1, 16)),
    "block": lambda o, x, gate, bias, image: (
        x.float() + gate * ((o + image.flatten(2).mT) * F.silu(x)).float()
    ),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize(("n", "kernels"), [(LONG, 3), (SHORT, 1)])
def test_what_follows_is_computed_in_the_output_kernel(name: str, n: int, kernels: int) -> None:
    def function(q, k, v, *beside):
        return EPILOGUES[name](merged(q, k, v), *beside)

    beside = (B, n, H * D), (B, 1, H * D), (H * D,), (B, H * D, n // 16, 16)
    text = code(function, *[heads(n)] * 3, *beside)
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
    """One graph for every batch and length: grid, splits and 1/n are computed from the sizes, and
    what follows is in the output kernel as well.
    """

    def function(q, k, v, x):
        return merged(q, k, v, scale=1 / k.shape[-2]) * F.silu(x)

    def make(make: nogpu.Make) -> list[torch.Tensor]:
        b, n = make.size(B), make.size(LONG)
        shapes = [(b, H, n, D)] * 3 + [(b, n, H * D)]
        return [make.tensor(*shape, dtype=torch.bfloat16) for shape in shapes]

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


@pytest.mark.parametrize("chosen", [0, -1])
def test_max_autotune_chooses_among_tiles_and_the_default_does_not(monkeypatch, chosen) -> None:
    """Where a kernel writes nothing but its output: that of three which has the epilogue."""
    offered: list[list[Any]] = []

    def choose(name: str, callers: list[Any], nodes: Any, layout: Any) -> Any:
        offered.append(callers)
        return callers[chosen].output_node()

    monkeypatch.setattr("bla_inductor.templates.launch.autotune_select_algorithm", choose)
    assert_fused(code(merged, *[heads(LONG)] * 3), 3)
    assert offered == []
    assert_fused(code(merged, *[heads(LONG)] * 3, max_autotune=True), 3)
    (callers,) = offered
    assert len({str(c.info_dict()) for c in callers}) == len(callers) > 2
    assert_fused(code(merged, *[heads(SHORT)] * 3, max_autotune=True), 1)
    assert len(offered) == 1


@pytest.mark.parametrize(("major", "overlaps"), [(9, True), (8, False), (12, False)])
@pytest.mark.parametrize(
    ("function", "tensors", "n"),
    [(merged, 3, LONG), (merged, 3, SHORT), (gradients, 4, LONG), (gradients, 4, SHORT)],
)
def test_kernels_overlap_where_the_device_can(
    monkeypatch, function, tensors, n, major, overlaps
) -> None:
    """Every kernel waits for the one before it, whatever Inductor put there, before it reads."""
    monkeypatch.setattr(nogpu, "CAPABILITY", (major, 0))
    heuristics.capability.cache_clear()
    try:
        sources = nogpu.kernels(code(function, *[heads(n)] * tensors)).values()
    finally:
        heuristics.capability.cache_clear()
    assert sources
    for source in sources:
        assert ("'launch_pdl': True" in source) == overlaps
        if "wait_for_previous(" in source:  # the text is the kernel's, not a call of one that waits
            assert f"wait_for_previous({overlaps})" in source
            body = source.partition("wait_for_previous(")[0]
            assert "tl.load" not in body
            assert "accumulate_state(" not in body
        else:
            assert f"PDL={overlaps}" in source


@pytest.mark.parametrize(("n", "rows"), [(SHORT, 64), (512, 128)])
def test_the_tile_of_one_launch_depends_on_the_length(n: int, rows: int) -> None:
    (source,) = nogpu.kernels(code(merged, *[heads(n)] * 3)).values()
    assert f"BLOCK_N : tl.constexpr = {rows}\n" in source


def wide(q, k, v, do):
    return gradients(q, k, v, do)


def test_what_the_templates_do_not_cover_is_called(caplog) -> None:
    shape = (B, H, SHORT, 168)
    lowering_cuda._reported.clear()
    with caplog.at_level(logging.INFO, logger="bla_inductor"):
        for _ in range(2):
            text = code(wide, *[shape] * 4)
    assert "torch.ops.bla.linear_attention_backward.default(" in text
    assert "torch.ops.bla.linear_attention_forward" not in text
    (record,) = (r for r in caplog.records if "is called instead of fused" in r.getMessage())
    assert record.levelno == logging.INFO
    assert "head dims 168, 168" in record.getMessage()


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
        # Rows travel to L2 while the program waits.
        assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")


def test_tiles_by_descriptors_of_tensors_beyond_two_to_the_31() -> None:
    """Inductor counts in 64 bits there; a descriptor's places are of 32."""
    shape = (2, 64, 2**31 // (128 * D) + 256, D)
    text = code(gradients, *[shape] * 4)
    wide = "INDEX_DTYPE : tl.constexpr = tl.int64"
    found = {n: s for n, s in nogpu.kernels(text).items() if wide in s and "TMA=True" in s}
    assert found
    for name, source in found.items():
        nogpu.assembled(name, source)


def test_a_bound_that_is_infinite() -> None:
    def function(q, k, v):
        return bla.linear_attention(q, k, v, normalizer="clamp", eps=float("-inf"))

    for name, source in nogpu.kernels(code(function, *[(2, SHORT, D)] * 3)).items():
        nogpu.assembled(name, source)
