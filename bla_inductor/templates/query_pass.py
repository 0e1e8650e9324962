"""The backward's pass over q and do, and the sum of its splits: see `bla_inductor.kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sympy import Min
from torch._inductor import lowering as inductor

from bla_inductor.kernels import heuristics
from bla_inductor.kernels.query_pass import query_pass_kernel
from bla_inductor.ops.feature_map import has_rows
from bla_inductor.templates import arguments, launch
from bla_inductor.templates.arguments import empty
from bla_inductor.templates.forward import MOST_SPLITS, Call, add_splits, rows_text, statistics
from bla_inductor.templates.launch import both
from bla_inductor.templates.operands import Expr, Node, Operands, equal, realized
from bla_inductor.templates.wanted import Wanted


def _sums_needed(call: Call, wanted: Wanted) -> tuple[bool, bool]:
    """Whether the key side asks for dstate and for dkey_sum."""
    dstate = "DK" in wanted or "DVALUE" in wanted or "DA" in wanted
    coupled = "DK" in wanted and call.norm == "coupled"
    return dstate, call.x.normalized and ("DKN" in wanted or "DA" in wanted or coupled)


def query_pass(
    call: Call, wanted: Wanted, do: Node, state: Node, key_sum: Node | None, precision: str
) -> tuple[Node, Node | None]:
    """Write dq, dq_norm; return dstate and dkey_sum with the state's batch."""
    x, D, DV, DN, device = call.x, call.D, call.DV, call.DN, call.device
    batch, key_batch = call.query_batch, call.key_batch
    same = all(map(equal, batch, key_batch))
    capability = heuristics.capability(device)
    fused = heuristics.fused_query_pass(D, DV, precision, capability)
    sizes = D, DV, DN, precision, capability
    tile = heuristics.query_pass_tile(*sizes, call.dtype, x.q_norm is not None)
    if x.q_norm is None and not has_rows(call.maps["q"]):
        tile = heuristics.in_two_pieces("query", call.dtype, *sizes) or tile
    if x.q_norm is None:
        elements = arguments.product(batch) * call.N * D
        tile = arguments.for_large("query", tile, sizes[:3], precision, elements, (x.q, do))
    wanted_sums = _sums_needed(call, wanted)
    tensors: dict[str, Any] = {
        "DO": (do, 2),
        "Q": (x.q, 2),
        "QN": x.q_norm and (x.q_norm, 2),
        "STATE": (state, 2),
        "SUM": key_sum and (key_sum, 1),
        **wanted.views("DQ", "DQN"),
    }
    written = wanted.buffers("DQ", "DQN")
    count = arguments.product(batch)
    each, splits = arguments.divided(call.N, count, tile, device)
    rows, slots = str(each), "1"
    weights: list[Node] = []
    dstate = dsum = partial = None
    targets = ["DO", "DO", "DO", "DO"]  # DSTATE DSUM W DZ
    strides = ["0", "0"]
    width = D * DV + (DN if x.normalized else 0)
    if any(wanted_sums) and not fused:
        weights = _token_weights(call)
        tensors["W"] = (realized(weights[0]), 1)
        targets[2:] = ["W", "W"]
        if x.normalized:
            tensors["DZ"] = (realized(weights[1]), 1)
            targets[3] = "DZ"
        written = [*written, *weights[: 1 + x.normalized]]
    elif any(wanted_sums):
        if not arguments.is_static(call.N):
            splits = Min(splits, MOST_SPLITS)
        if same and equal(splits, 1):
            dstate = empty([*batch, D, DV], torch.float32, device)
            tensors["DSTATE"] = (realized(dstate), 2)
            targets[:2], strides = ["DSTATE", "DSTATE"], [f"{D * DV}", f"{DN}"]
            written = [*written, dstate]
            if x.normalized:
                dsum = empty([*batch, DN], torch.float32, device)
                tensors["DSUM"], targets[1] = (realized(dsum), 1), "DSUM"
                written = [*written, dsum]
        else:
            partial = empty([*batch, splits, width], torch.float32, device)
            tensors["DSTATE"] = (realized(partial), 2)
            targets[:2] = ["DSTATE", f"DSTATE + {D * DV}"]
            strides = [f"{width}"] * 2
            written = [*written, partial]
    operands = Operands(batch, tensors)
    slots = operands.expression(splits)
    if not arguments.is_static(call.N):
        rows = rows_text(operands.size("Q", 2), slots, tile.BLOCK_N)
    launch.call(
        query_pass_kernel,
        operands,
        [
            *(operands.pointer(name) for name in ("DO", "Q", "QN", "DQ", "DQN", "STATE", "SUM")),
            *targets,
            operands.size("Q", 2),
            rows,
            slots,
            operands.inner,
            *(operands.expression(number) for number in x.numbers[1:]),
            *(operands.strides(name) for name in ("DO", "Q", "QN", "DQ", "DQN")),
            operands.strides("STATE", 2),
            operands.strides("SUM", 2),
            *strides,
        ],
        {
            "D": D,
            "DV": DV,
            "DN": DN,
            "NORMALIZER": x.normalizer,
            "DECOUPLED": x.q_norm is not None,
            "NEED_DQ": "DQ" in wanted,
            "NEED_DQN": "DQN" in wanted,
            "NEED_DSTATE": wanted_sums[0] and fused,
            "NEED_DSUM": wanted_sums[1] and fused,
            "STORE_WEIGHTS": bool(weights),
            "PRECISION": precision,
            "BIG": operands.big(tile.BLOCK_N),
        },
        both({"Q_MAP": call.maps["q"], "QN_MAP": call.maps["q_norm"]}),
        call.dtype,
        tile,
        count * splits,
        written,
    )
    if weights:
        dstate, dsum = _weighted_statistics(call, do, weights, precision)
    elif partial is not None:
        dstate = empty([*key_batch, D, DV], torch.float32, device)
        dsum = empty([*key_batch, DN] if x.normalized else [0], torch.float32, device)
        add_splits(_over_batch(partial, key_batch), dstate, dsum, x.normalized)
    return dstate, dsum if x.normalized else None


def _token_weights(call: Call) -> list[Node]:
    """Buffers for w and dz of every query, the first filled where it is a constant."""
    sizes = [*call.query_batch, call.N]
    if call.x.normalized:
        return [empty(sizes, torch.float32, call.device) for _ in range(2)]
    filled = inductor.lowerings[torch.ops.aten.full.default](
        sizes, call.x.scale, dtype=torch.float32, device=call.device
    )
    filled.realize()
    return [filled, filled]


def _weighted_statistics(
    call: Call, do: Node, weights: Sequence[Node], precision: str
) -> tuple[Node, Node]:
    """dstate = Σ_n qf (w·do) and dkey_sum = Σ_n dz·qn, with the state's batch."""
    x = call.x
    norm = "none" if not x.normalized else "coupled" if x.q_norm is None else "decoupled"
    w, dz = map(realized, weights)
    dstate, dsum = statistics(
        call.device,
        {"K": x.q, "V": do, "KN": x.q_norm},
        call.query_batch,
        norm,
        precision,
        {"K_MAP": call.maps["q"], "KN_MAP": call.maps["q_norm"]},
        (w, dz),
    )
    if x.normalized:
        dsum = _over_batch(dsum, call.key_batch)
    return _over_batch(dstate, call.key_batch), dsum


def _over_batch(node: Node, batch: Sequence[Expr]) -> Node:
    """The node with the batch dims summed that `batch` broadcasts."""
    sizes = node.get_size()
    dims = [d for d, size in enumerate(batch) if not equal(size, sizes[d])]
    if not dims:
        return node
    total = inductor.lowerings[torch.ops.aten.sum.dim_IntList](node, dims, keepdims=True)
    total.realize()
    return total
