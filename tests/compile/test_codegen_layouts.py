"""What becomes, in Inductor's code, of operands that the kernels cannot read as they would lie:
computed in a layout that suits, or copied by a loop of Inductor's. Never a call of the operator.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bla_inductor import lowering
from tests.compile import nogpu
from tests.compile.test_codegen import (
    FORMULA,
    LONG,
    SHORT,
    TOKENS_LAST,
    B,
    D,
    H,
    bla,
    code,
    gradients,
    heads,
    merged,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="imagines a device where there is none"
)

LENGTHS = pytest.mark.parametrize(("n", "kernels"), [(LONG, 3), (SHORT, 1)])


@pytest.fixture(autouse=True)
def _registered() -> None:
    lowering.register()


def image(n: int) -> tuple[int, int, int]:
    """Channels before tokens."""
    return B, H * D, n


def of_image(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(1, (H, D)).mT


def loops_and_templates(text: str) -> tuple[int, int]:
    """How many launches of each, if there are no others."""
    assert "torch.ops.bla" not in text
    loops, templates = (len(re.findall(rf"triton_{x}_\w+\.run\(", text)) for x in ("poi", "tem"))
    assert loops + templates == text.count(".run(")
    return loops, templates


def written(text: str, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The strides of the buffers of these sizes."""
    shape = re.escape(str(sizes))
    found = re.findall(rf"empty_strided_cuda\({shape}, \(([\d, ]+)\)", text)
    return [tuple(map(int, strides.split(","))) for strides in found]


@LENGTHS
def test_what_is_in_memory_is_copied_by_a_loop(n: int, kernels: int) -> None:
    def function(q, k, v):
        return merged(*map(of_image, (q, k, v)))

    text = code(function, *[image(n)] * 3)
    assert loops_and_templates(text) == (3, kernels)
    assert {strides[-1] for strides in written(text, heads(n))} == {1}


@LENGTHS
def test_what_is_computed_is_written_as_the_kernels_read_it(n: int, kernels: int) -> None:
    """The loop that computes q, k and v stores them with their channels beside each other."""

    def function(q, k, v, bias):
        q, k, v = (F.gelu(x + bias) for x in (q, k, v))
        return merged(*map(of_image, (q, k, v)))

    text = code(function, *[image(n)] * 3, (H * D, 1))
    assert loops_and_templates(text) == (1, kernels)
    assert written(text, image(n)) == [(H * D * n, 1, H * D)] * 3


@pytest.mark.parametrize("computed", [False, True])
def test_only_the_channels_change_their_place(computed: bool) -> None:
    """Where heads are innermost, channels are put there, and tokens stay outside of heads."""

    def function(q, k, v):
        k = k.unflatten(-1, (D, H)).permute(0, 3, 1, 2)
        return merged(q, k.exp() if computed else k, v)

    text = code(function, heads(LONG), (B, LONG, H * D), heads(LONG))
    assert loops_and_templates(text) == (1, 3)
    assert written(text, heads(LONG)) == [(LONG * H * D, D, H * D, 1)]


def test_a_convolution_with_its_channels_last_is_read_where_it_is() -> None:
    """Inductor lays it out so; only the image and the bias take a loop."""

    def function(x, weight, bias):
        y = F.conv2d(x, weight, bias).flatten(2).unflatten(1, (3, H, D))
        return merged(*(t.mT for t in y.unbind(1)))

    channels = 3 * H * D
    text = code(function, (B, 64, 64, 64), (channels, 64, 1, 1), (channels,))
    assert loops_and_templates(text) == (2, 3)
    assert text.count("extern_kernels.") == 1
    assert written(text, heads(64 * 64)) == []


def test_what_repeats_memory_is_copied_once() -> None:
    def function(q, k, v):
        k, v = (x.mT.unsqueeze(1).expand(heads(LONG)) for x in (k, v))
        return merged(q, k, v)

    text = code(function, heads(LONG), (B, D, LONG), (B, D, LONG))
    assert loops_and_templates(text) == (2, 3)
    assert len(written(text, (B, 1, LONG, D))) == 2
    assert written(text, heads(LONG)) == []


@pytest.mark.parametrize(("n", "kernels"), [(LONG, 5), (SHORT, 2)])
def test_the_incoming_gradient_is_copied_by_a_loop(n: int, kernels: int) -> None:
    def function(q, k, v, do):
        return gradients(q, k, v, of_image(do))

    text = code(function, *[heads(n)] * 3, image(n))
    assert loops_and_templates(text) == (1, kernels)


@pytest.mark.parametrize(("n", "kernels"), [(LONG, 5), (SHORT, 2)])
def test_the_gradient_of_one_projection_is_written_into_it(n: int, kernels: int) -> None:
    """With an incoming gradient that is copied: the packed operator's way."""

    def function(qkv, do):
        q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
        grads = gradients(q, k, v, of_image(do), orders=TOKENS_LAST * 5)
        return torch.cat([x.transpose(1, 2).flatten(2) for x in grads], -1)

    text = code(function, (B, n, 3 * H * D), image(n))
    assert loops_and_templates(text) == (1, kernels)
    assert len(written(text, (B, n, 3 * H * D))) == 1


def test_symbolic_sizes() -> None:
    def function(q, k, v):
        return merged(of_image(q), *(of_image(x).exp() for x in (k, v)))

    def make(make: nogpu.Make) -> list[torch.Tensor]:
        b, n = make.size(B), make.size(LONG)
        return [make.tensor(b, H * D, n, dtype=torch.bfloat16) for _ in range(3)]

    text = nogpu.code(function, make)
    assert loops_and_templates(text) == (3, 3)
    found = re.findall(r"empty_strided_cuda\((.*), torch.bfloat16\)", text)
    assert all(strides.endswith(" 1)") for strides in found)


def windows(x: torch.Tensor) -> torch.Tensor:
    """Batch dims of three unrelated strides."""
    return x.permute(3, 2, 0, 1, 4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [LONG, SHORT])
def test_batch_dims_that_do_not_merge_are_copied_by_loops(n: int, backward: bool) -> None:
    def function(q, k, v, do):
        inputs = (windows(q), windows(k), windows(v))
        if backward:
            return gradients(*inputs, windows(do), orders=[2, 3, 1, 0, 4] * 5)
        return bla.linear_attention(*inputs, **FORMULA)

    text = code(function, *[(3, n, 2, 4, D)] * 4)
    loops, templates = loops_and_templates(text)
    assert loops == (7 if backward else 3)  # gradients leave in the order of their tensors
    assert templates == {LONG: (3, 5), SHORT: (1, 2)}[n][backward]


def test_one_kernel_for_all_only_where_batch_dims_merge_for_all() -> None:
    def function(q, k, v):
        q = q.permute(2, 0, 1, 3, 4)
        k, v = (x.permute(1, 2, 0, 3, 4) for x in (k, v))
        return bla.linear_attention(q, k, v, **FORMULA)

    text = code(function, (2, 4, 3, SHORT, D), *[(4, 3, 2, SHORT, D)] * 2)
    assert loops_and_templates(text) == (0, 2)


def test_rows_of_no_multiple_of_16_bytes_stay_a_call(caplog: Any) -> None:
    def function(q, k, v):
        return bla.linear_attention(q, k, v, **FORMULA, out_order=TOKENS_LAST)

    with caplog.at_level("INFO", logger="bla_inductor"):
        text = code(function, *[(B, H, SHORT, 20)] * 3)
    assert "torch.ops.bla.linear_attention.default(" in text
    assert any("no multiple of 16 bytes" in r.getMessage() for r in caplog.records)


@LENGTHS
@pytest.mark.parametrize("beside", [False, True])
def test_an_image_for_a_convolution_is_written_channels_last(
    n: int, kernels: int, beside: bool
) -> None:
    """Eager mode writes channels first here, and Inductor asks for channels last; a copy in the
    epilogue would store element by element.
    """

    def function(q, k, v, x, weight):
        out = bla.linear_attention(q, k, v, **FORMULA, out_order=[0, 1, 3, 2])
        out = out.mT.reshape(B, H * D, n // 16, 16)
        return F.conv2d(out + x if beside else out, weight)

    shapes = [*[heads(n)] * 3, (B, H * D, n // 16, 16), (H * D, H * D, 1, 1)]
    text = code(function, *shapes, inference=True)
    last = [s for s in nogpu.kernels(text).values() if "output_tile" in s][-1]
    assert text.count("extern_kernels.convolution(") == 1
    assert f"{H * D}*idx_2" in last  # a step to the right in the image
    assert re.search(r"tl\.store\(out_ptr\d \+ \(tl\.broadcast_to\(xindex, ", last)
    before = text.partition("extern_kernels.convolution(")[0]
    assert len(re.findall(r"triton_tem_\w+\.run\(", before)) == kernels


@LENGTHS
def test_tokens_before_a_convolution_keep_their_features_innermost(n: int, kernels: int) -> None:
    """(B, heads, N, Dv) has four dims as an image has, and what reads it comes before a convolution
    (CoaT): written as Inductor has images, with the heads innermost, CoaT took 1.1 times as long.
    """

    def function(q, k, v, x, weight):
        out = bla.linear_attention(q, k, v, **FORMULA) * x
        out = out.transpose(1, 2).flatten(2)
        return F.conv2d(out.mT.unflatten(2, (n // 16, 16)), weight)

    text = code(function, *[heads(n)] * 3, (B, H, n, D), (H * D, H * D, 1, 1), inference=True)
    assert not written(text, (B, n, D, H))
    last = [s for s in nogpu.kernels(text).values() if "output_tile" in s][-1]
    assert re.search(rf"tl\.store\(\w+ \+ .*idx_3 \+ {D}\*", last)
    before = text.partition("extern_kernels.convolution(")[0]
    assert len(re.findall(r"triton_tem_\w+\.run\(", before)) == kernels


@pytest.mark.parametrize("channels", [64, 128])
def test_what_is_kept_between_convolutions_is_what_the_kernels_read(channels: int) -> None:
    """Not with its heads innermost, which is how "channels last" would have it. The loops are those
    of the image, of its result, and one that computes k.
    """

    def function(x, weight, last):
        y = F.conv2d(x, weight).unflatten(1, (3, H, D)).flatten(4)
        q, k, v = y.unbind(1)
        q, k, v = q.mT, k.exp(), v.mT
        out, *statistics = bla.linear_attention_forward(q, k.mT, v, out_order=[0, 1, 3, 2])
        return F.conv2d(out.mT.reshape(B, H * D, 64, 64), last), q, k, v, *statistics

    shapes = (B, channels, 64, 64), (3 * H * D, channels, 1, 1), (channels, H * D, 1, 1)
    text = code(function, *shapes, kept=5)
    assert loops_and_templates(text) == (3, 3)
    assert written(text, (B, H, D, D)) == [(H * D * D, D * D, D, 1)]
    C, N = H * D, 64 * 64
    assert written(text, (B, H, D, N)) == [(C * N, D, 1, C)]  # k
    q_and_v = re.findall(rf"\({B}, {H}, {N}, {D}\), \(([\d, ]+)\), (\d+)\)", text)
    assert q_and_v == [(f"{3 * C * N}, {D}, {3 * C}, 1", offset) for offset in ("0", f"{2 * C}")]


def test_the_state_that_is_kept_before_a_convolution_is_contiguous() -> None:
    """As in SANA, whose feed-forward has convolutions; q, k and v are parts of the projection."""

    def function(x, weight, image):
        q, k, v = (x @ weight).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
        out, *statistics = bla.linear_attention_forward(q, k, v, **FORMULA, out_order=TOKENS_LAST)
        out = out.transpose(1, 2).flatten(2).mT.unflatten(2, (64, 64))
        return F.conv2d(out, image), q, k, v, *statistics

    shapes = (B, 64 * 64, H * D), (H * D, 3 * H * D), (H * D, H * D, 1, 1)
    text = code(function, *shapes, kept=5)
    assert written(text, (B, H, D, D)) == [(H * D * D, D * D, D, 1)]
    assert written(text, heads(64 * 64)) == []


def test_what_is_kept_where_convolutions_read_channels_first() -> None:
    """The copies that the kernels read, so that the backward makes none."""

    def function(x, weight):
        y = F.conv2d(x, weight).unflatten(1, (3, H, D)).flatten(4)
        q, k, v = (t.mT for t in y.unbind(1))
        return *bla.linear_attention_forward(q, k, v), q, k, v

    text = code(function, (B, 64, 64, 64), (3 * H * D, 64, 1, 1), kept=5, layout_optimization=False)
    assert loops_and_templates(text) == (3, 3)
    assert written(text, heads(64 * 64)) == [(4096 * H * D, 4096 * D, D, 1)] * 4


def test_results_of_the_user_stay_as_they_are() -> None:
    """Also where they are kept."""

    def function(x, weight):
        y = F.conv2d(x, weight).unflatten(1, (3, H, D)).flatten(4)
        q, k, v = (t.mT for t in y.unbind(1))
        q = q + 1
        return q, *bla.linear_attention_forward(q, k, v), q

    text = code(function, (B, 64, 64, 64), (3 * H * D, 64, 1, 1), kept=4)
    assert (4096 * H * D, 4096 * D, 1, 4096) in written(text, heads(64 * 64))
