"""Tiles in two pieces, by descriptors, and of the whole state of a wide head.

In Triton's interpreter, which must be on before triton is imported: not collected as it stands, but
run by test_kernels_interpreted.py in a process of its own. fp16 and fp32 only; bf16 products are
garbage there.
"""

from __future__ import annotations

import pytest
import torch
from bla_inductor.kernels import heuristics, large
from interpreted_cases import (
    ELU1,
    check,
    constants_seen,
    fp16,
    fp32,
    in_several_launches,
    inputs,
    poisoned,  # noqa: F401 (a fixture)
    signed,
    weights,
)

from bla_inductor import compat


def pieces_seen(monkeypatch):
    """REST of the launches by kernel, once kernels have run; fp16 in pieces as well, since the
    interpreter has no bf16.
    """
    monkeypatch.setattr(heuristics, "IN_TWO_PIECES", (fp16,))
    return constants_seen(monkeypatch, "REST")


IN_TWO = ("query_pass_kernel", "key_pass_kernel")


@pytest.mark.parametrize("normalizer", ["none", "add", "clamp"])
@pytest.mark.parametrize(("d", "rests"), [(72, (16, 0)), (80, (16, 16)), (96, (0, 32))])
def test_two_pieces(d, rests, normalizer, monkeypatch):
    in_several_launches(monkeypatch)
    seen = pieces_seen(monkeypatch)
    tensors, do = inputs(150, 130, d, d, fp16, signed)
    check(tensors, do, maps=(ELU1, ELU1, "", ""), normalizer=normalizer)
    assert seen == dict(zip(IN_TWO, rests, strict=True))


@pytest.mark.parametrize("needs", ["100", "010", "001", "110"])
@pytest.mark.parametrize("maps", [("",) * 4, (ELU1, ELU1, "", "")])
def test_two_pieces_of_the_gradients_that_are_needed(needs, maps, monkeypatch):
    in_several_launches(monkeypatch)
    seen = pieces_seen(monkeypatch)
    tensors, do = inputs(70, 90, 80, 80, fp16, signed)
    needs = (*(n == "1" for n in needs), False, False, False)
    check(tensors, do, needs, maps=maps, normalizer="add" if any(maps) else "none")
    assert set(seen.values()) == {16}


def test_one_piece_where_two_do_not_know_how(monkeypatch):
    in_several_launches(monkeypatch)
    seen = pieces_seen(monkeypatch)
    tensors, do = inputs(70, 90, 80, 80, fp16)
    check((*tensors, None, None, weights(90)), do, maps=("softmax", "softmax", "", ""))
    assert seen == dict.fromkeys(IN_TWO, 0)


STATE, OUTPUT, QUERY = "state_kernel", "output_kernel", "query_pass_kernel"


@pytest.mark.parametrize("normalizer", ["none", "add"])
@pytest.mark.parametrize(
    ("d", "by_descriptors"),
    [(40, set()), (64, {STATE, QUERY}), (72, {STATE, OUTPUT}), (160, {STATE, OUTPUT})],
)
def test_descriptors(d, by_descriptors, normalizer, monkeypatch):
    """Tiles with rows and columns beyond the last, read as a whole: 0 there."""
    in_several_launches(monkeypatch)
    monkeypatch.setattr(large, "MIB", 0)
    seen = constants_seen(monkeypatch, "TMA")
    tensors, do = inputs(150, 130, d, d, fp16, signed)
    check(tensors, do, maps=(ELU1, ELU1, "", ""), normalizer=normalizer)
    assert {kernel for kernel, tma in seen.items() if tma} == by_descriptors


@pytest.mark.parametrize("normalizer", ["none", "add"])
@pytest.mark.parametrize(("d", "rows"), [(24, 256), (32, 256), (40, 128), (48, 128)])
def test_tiles_of_narrow_heads(d, rows, normalizer, monkeypatch):
    """Those of bf16, in fp16. rows: of the key pass."""
    in_several_launches(monkeypatch)
    monkeypatch.setattr(large, "MIB", 0)
    monkeypatch.setattr(large, "WHOLE_IN", (fp16,))
    large._large.cache_clear()
    descriptors = constants_seen(monkeypatch, "TMA")
    blocks = constants_seen(monkeypatch, "BLOCK_N")
    tensors, do = inputs(300, 130, d, d, fp16, signed)
    check(tensors, do, maps=(ELU1, ELU1, "", ""), normalizer=normalizer)
    large._large.cache_clear()
    assert {kernel for kernel, tma in descriptors.items() if tma} == ({QUERY} if d > 32 else set())
    assert blocks["key_pass_kernel"] == rows


def test_descriptors_in_fp32(monkeypatch):
    in_several_launches(monkeypatch)
    monkeypatch.setattr(large, "MIB", 0)
    monkeypatch.setattr(compat, "fits_query_tiles", lambda: True)
    large._float32.cache_clear()
    seen = constants_seen(monkeypatch, "TMA")
    tensors, do = inputs(150, 130, 64, 64, fp32, signed)
    check(tensors, do, maps=(ELU1, ELU1, "", ""))
    large._float32.cache_clear()
    assert {kernel for kernel, tma in seen.items() if tma} == {STATE, OUTPUT, QUERY}


@pytest.mark.parametrize("normalizer", ["none", "add", "clamp"])
@pytest.mark.parametrize("weight", [None, torch.bool, fp16])
@pytest.mark.parametrize("descriptors", [False, True])
def test_the_whole_state_of_a_wide_head(descriptors, weight, normalizer, monkeypatch):
    """In the query pass, with the sums over the queries in a pass of their own; in fp16, since the
    interpreter's bf16 is wrong.
    """
    monkeypatch.setattr(large, "WHOLE_IN", (fp16,))
    monkeypatch.setattr(large, "MIB", 0 if descriptors else 1 << 40)
    large._large.cache_clear()
    seen = constants_seen(monkeypatch, "TMA")
    tensors, do = inputs(70, 85, 144, 144, fp16, signed)
    key_weight = None if weight is None else torch.rand(1, 2, 85)
    if key_weight is not None:
        key_weight = key_weight > 0.3 if weight == torch.bool else key_weight.to(weight)
    arguments = (*tensors, None, None, key_weight)
    check(arguments, do, maps=(ELU1, ELU1, "", ""), normalizer=normalizer)
    large._large.cache_clear()
    assert set(seen) == {STATE, OUTPUT, QUERY}
    assert all(tma == descriptors for tma in seen.values())


@pytest.mark.parametrize("weight", [torch.bool, fp16])
def test_rows_that_a_weight_drops_are_not_read_by_descriptors(weight, monkeypatch):
    in_several_launches(monkeypatch)
    monkeypatch.setattr(large, "MIB", 0)
    seen = constants_seen(monkeypatch, "TMA")
    tensors, do = inputs(70, 85, 64, 64, fp16, signed)
    if weight == torch.bool:
        key_weight = torch.rand(1, 2, 85) > 0.3
    else:
        key_weight = torch.rand(1, 2, 85).to(weight)
    check((*tensors, None, None, key_weight), do, maps=(ELU1, ELU1, "", ""))
    assert not seen[STATE]


def test_no_descriptor_steps_by_nothing(monkeypatch):
    """One key, repeated without being copied."""
    in_several_launches(monkeypatch)
    monkeypatch.setattr(large, "MIB", 0)
    seen = constants_seen(monkeypatch, "TMA")
    (q, k, v), do = inputs(70, 85, 64, 64, fp16, signed)
    check((q, k[..., :1, :].expand_as(k), v), do, maps=(ELU1, ELU1, "", ""))
    assert not seen[STATE]
    assert seen[QUERY]
