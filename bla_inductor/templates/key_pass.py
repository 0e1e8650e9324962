"""The backward's pass over k and v, and the one kernel of short sequences: see the kernels."""

from __future__ import annotations

from bla_inductor.kernels import heuristics, short_heuristics
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.kernels.key_pass import key_pass_kernel
from bla_inductor.kernels.short import short_backward_kernel
from bla_inductor.ops.feature_map import has_rows
from bla_inductor.templates import arguments, launch
from bla_inductor.templates.forward import Call
from bla_inductor.templates.launch import both
from bla_inductor.templates.operands import Node, Operands, realized
from bla_inductor.templates.wanted import NAMES, Wanted, needs


def key_pass(call: Call, wanted: Wanted, dstate: Node, dsum: Node | None, precision: str) -> None:
    """Write dk, dv, dk_norm, dkey_weight."""
    x, D, DV = call.x, call.D, call.DV
    DN = D if dsum is None else call.DN
    batch, outputs = call.key_batch, ("DK", "DVALUE", "DKN", "DA")
    sizes = D, DV, DN, precision, heuristics.capability(call.device)
    tile = heuristics.key_pass_tile(*sizes)
    if x.k_norm is None and x.key_weight is None and not has_rows(call.maps["k"]):
        tile = heuristics.in_two_pieces("key", call.dtype, *sizes) or tile
    if x.k_norm is None:
        elements = arguments.product(batch) * call.M * D
        tile = arguments.for_large("key", tile, sizes[:3], precision, elements, (x.k, x.v))
    operands = Operands(
        batch,
        {
            "K": (x.k, 2),
            "V": (x.v, 2),
            "KN": x.k_norm and (x.k_norm, 2),
            "A": x.key_weight and (x.key_weight, 1),
            "DSTATE": (realized(dstate), 2),
            "DSUM": None if dsum is None else (realized(dsum), 1),
            **wanted.views(*outputs),
        },
    )
    each, chunks = arguments.divided(call.M, operands.count, tile, call.device)
    launch.call(
        key_pass_kernel,
        operands,
        [
            *(operands.pointer(name) for name in ("K", "V", "KN", "A", *outputs)),
            operands.pointer("DSTATE"),
            operands.pointer("DSUM"),
            operands.size("K", 2),
            str(each),
            operands.expression(chunks),
            operands.inner,
            *(operands.strides(name) for name in ("K", "V", "KN")),
            operands.strides("A", 3),
            *(operands.strides(name) for name in ("DK", "DVALUE", "DKN")),
            operands.strides("DA", 3),
            operands.strides("DSTATE", 2),
            operands.strides("DSUM", 2),
        ],
        {
            "D": D,
            "DV": DV,
            "DN": DN,
            "NORM": call.norm if dsum is not None else "none",
            "WEIGHT": arguments.weight_kind(x.key_weight),
            **needs(wanted, "DK", "DVALUE", "DKN", "DA"),
            "PRECISION": precision,
            "BIG": operands.big(tile.BLOCK_N),
        },
        both({"K_MAP": call.maps["k"], "KN_MAP": call.maps["k_norm"]}),
        call.dtype,
        tile,
        operands.count * chunks,
        wanted.buffers(*outputs),
    )


def short_backward(
    call: Call,
    wanted: Wanted,
    do: Node,
    state: Node,
    key_sum: Node | None,
    precision: str,
    parts: int,
) -> None:
    """All gradients in one kernel: see `bla_inductor.kernels.short`."""
    x = call.x
    tile: Tile = short_heuristics.short_backward_tile(call.D, call.DV, call.DN)
    operands = Operands(
        call.query_batch,
        {
            "DO": (do, 2),
            "Q": (x.q, 2),
            "K": (x.k, 2),
            "V": (x.v, 2),
            "QN": x.q_norm and (x.q_norm, 2),
            "KN": x.k_norm and (x.k_norm, 2),
            "A": x.key_weight and (x.key_weight, 1),
            "STATE": (state, 2),
            "SUM": key_sum and (key_sum, 1),
            **wanted.views(*NAMES),
        },
    )
    N, M = int(call.N), int(call.M)
    _, parts = short_heuristics.equal_parts(max(N, M), parts, tile)
    inputs = ("DO", "Q", "K", "V", "QN", "KN", "A")
    launch.call(
        short_backward_kernel,
        operands,
        [
            *(operands.pointer(name) for name in (*inputs, *NAMES, "STATE", "SUM")),
            str(N),
            str(M),
            str(short_heuristics.rows_of_part(N, parts, tile)),
            str(short_heuristics.rows_of_part(M, parts, tile)),
            str(parts),
            operands.inner,
            *(operands.expression(number) for number in x.numbers[1:]),
            *(operands.strides(name) for name in inputs[:-1]),
            operands.strides("A", 3),
            *(operands.strides(name) for name in NAMES[:-1]),
            operands.strides("DA", 3),
            operands.strides("STATE", 2),
            operands.strides("SUM", 2),
        ],
        {
            "D": call.D,
            "DV": call.DV,
            "DN": call.DN,
            "NORMALIZER": x.normalizer,
            "NORM": call.norm,
            "DECOUPLED": x.q_norm is not None,
            "WEIGHT": arguments.weight_kind(x.key_weight),
            **needs(wanted, *NAMES),
            "PRECISION": precision,
            "BIG": operands.big(tile.BLOCK_N),
        },
        both(
            {
                "Q_MAP": call.maps["q"],
                "K_MAP": call.maps["k"],
                "QN_MAP": call.maps["q_norm"],
                "KN_MAP": call.maps["k_norm"],
            }
        ),
        call.dtype,
        tile,
        operands.count * parts,
        wanted.buffers(*NAMES),
    )
