"""The forward as templates: state, sum of the splits, output; or all in one for short sequences.

The counterpart of `bla_inductor.kernels.forward`, whose tables of arguments it follows. Only the
last kernel has an epilogue: the others write what the next one reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Min

from bla_inductor.kernels import heuristics, short_heuristics, state
from bla_inductor.kernels.precision import output_precision, state_precision
from bla_inductor.ops.feature_torch import finite_at_zero
from bla_inductor.ops.schema import Inputs
from bla_inductor.templates import Unsupported, arguments, launch
from bla_inductor.templates.arguments import broadcast, empty, static
from bla_inductor.templates.operands import (
    Expr,
    Node,
    Operands,
    equal,
    merges,
    realized,
)
from bla_inductor.templates.output import apply_state, short_forward
from bla_inductor.templates.tiles import in_tiles, over_batch

MOST_SPLITS = 64


@dataclass(frozen=True)
class Call:
    """What the forward and the backward both need to know of the arguments.

    x: `Inputs` whose tensors are realized nodes. D, DV, DN: head dims. The batches are those of the
    result and of the state. maps: their texts, of q, k, q_norm and k_norm.
    """

    x: Any
    device: torch.device
    dtype: torch.dtype
    N: Expr
    M: Expr
    D: int
    DV: int
    DN: int
    query_batch: list[Expr]
    key_batch: list[Expr]
    maps: Mapping[str, str]

    @property
    def norm(self) -> str:
        """NORM of the kernels."""
        if not self.x.normalized:
            return "none"
        return "coupled" if self.x.k_norm is None else "decoupled"


def bound(x: Any) -> Call:
    """The arguments, realized. Unsupported where the kernels do not cover them."""
    device, dtype = x.q.get_device(), x.q.get_dtype()
    if device.type != "cuda":
        raise Unsupported(f"the templates are for CUDA, and this is {device.type}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise Unsupported(f"the kernels do not compute in {dtype}")
    for name in ("q", "k", "v", "q_norm", "k_norm", "key_weight"):
        node = getattr(x, name)
        if node is not None:
            setattr(x, name, realized(node) if name == "key_weight" else in_tiles(name, node))
            if any(equal(size, 0) for size in node.get_size()):
                raise Unsupported(f"{name} has no elements")
    for text in x.maps:
        if not finite_at_zero(text, dtype):
            raise Unsupported(f"the feature map {text} has no value at zero in {dtype}")
    D, DV, DN = (static(t.get_size()[-1]) for t in (x.q, x.v, x.key_norm))
    if max(D, DV, DN) > 256:
        raise Unsupported(f"head dims {D}, {DV}, {DN}: the kernels take at most 256")
    queries = [t.get_size()[:-2] for t in x.tensors[:5] if t is not None]
    keys = [t.get_size()[:-2] for t in (x.k, x.v, x.k_norm) if t is not None]
    if x.key_weight is not None:
        queries.append(x.key_weight.get_size()[:-1])
        keys.append(x.key_weight.get_size()[:-1])
    query_batch, key_batch = broadcast(queries), broadcast(keys)
    read = {name: getattr(x, name) for name in ("k", "v", "k_norm", "key_weight")}
    for name, node in over_batch(key_batch, read, key_batch).items():
        setattr(x, name, node)
    read = {name: getattr(x, name) for name in ("q", "q_norm")}
    for name, node in over_batch(query_batch, read, key_batch).items():
        setattr(x, name, node)
    names = ("q", "k", "q_norm", "k_norm")
    return Call(
        x,
        device,
        dtype,
        x.q.get_size()[-2],
        x.k.get_size()[-2],
        D,
        DV,
        DN,
        query_batch,
        key_batch,
        dict(zip(names, x.maps, strict=True)),
    )


def forward(x: Inputs) -> tuple[Node, Node, Node]:
    """(out, state, key_sum), as `bla::linear_attention_forward` returns them, for an `x` that holds
    nodes.
    """
    call = bound(x)
    out_dtype = x.out_dtype or call.dtype
    state_in = state_precision(
        call.dtype,
        out_dtype,
        weighted=arguments.weight_kind(x.key_weight) == "float",
        upcast=x.upcast,
    )
    output_in = output_precision(call.dtype, out_dtype, call.D, upcast=x.upcast)
    exact = state_in == "native" and out_dtype == torch.float32
    parts = _short_parts(call, state_in, output_in)
    if parts:
        return short_forward(call, out_dtype, state_in, output_in, exact, parts)
    sums = statistics(
        call.device,
        {"K": x.k, "V": x.v, "KN": x.k_norm},
        call.key_batch,
        call.norm,
        state_in,
        {"K_MAP": call.maps["k"], "KN_MAP": call.maps["k_norm"]},
        (x.key_weight, x.key_weight),
        exact,
    )
    out = apply_state(call, out_dtype, realized(sums[0]), realized(sums[1]), output_in)
    return out, *sums


def _short_parts(call: Call, state_in: str, output_in: str) -> int:
    """Programs a head of the kernel for short sequences; 0: not that one. A symbolic length may
    turn out long.
    """
    same = all(map(equal, call.query_batch, call.key_batch))
    if not same or not arguments.is_static(call.N, call.M):
        return 0
    if not merges(call.query_batch, call.x.tensors):
        return 0
    return short_heuristics.short_forward_parts(
        arguments.hint(arguments.product(call.query_batch)),
        int(call.N),
        int(call.M),
        call.D,
        call.DV,
        call.DN,
        call.dtype.itemsize,
        state_in,
        output_in,
        heuristics.multiprocessors(call.device),
        heuristics.capability(call.device),
    )


def statistics(
    device: torch.device,
    inputs: Mapping[str, Node | None],
    batch: Sequence[Expr],
    norm: str,
    precision: str,
    maps: Mapping[str, str],
    weights: tuple[Node | None, Node | None],
    exact: bool = False,
) -> tuple[Node, Node]:
    """state (*batch, D, Dv) and key_sum (*batch, D') or (0,), fp32, of K, V and KN."""
    k, v, k_norm = (inputs[name] for name in ("K", "V", "KN"))
    assert k is not None
    assert v is not None
    D, DV = static(k.get_size()[-1]), static(v.get_size()[-1])
    DN = static((k if k_norm is None else k_norm).get_size()[-1])
    M, normalized = k.get_size()[-2], norm != "none"
    plain = not exact and k_norm is None and arguments.weight_kind(weights[0]) != "float"
    tile = heuristics.state_tile(D, DV, DN, precision, heuristics.capability(device), plain)
    count = arguments.product(batch)
    if k_norm is None and not exact and arguments.weight_kind(weights[0]) != "mask":
        kernel = "state" if weights[0] is None else "weighted state"
        tile = arguments.for_large(kernel, tile, (D, DV, DN), precision, count * M * D, (k, v))
    tiles = -(-DV // tile.BLOCK_V)
    each, splits = arguments.divided(M, count * tiles, tile, device)
    rows = str(each)
    if not arguments.is_static(M):
        splits = Min(splits, MOST_SPLITS)
    sums = empty([*batch, D, DV], torch.float32, device)
    key_sum = empty([*batch, DN] if normalized else [0], torch.float32, device)
    width = D * DV + (DN if normalized else 0)
    written: dict[str, Any] = {"STATE": (realized(sums), 2)}
    if normalized:
        written["SUM"] = (realized(key_sum), 1)
    several = not equal(splits, 1)
    if several:
        partial = empty([*batch, splits, width], torch.float32, device)
        written = {"STATE": (realized(partial), 2)}
    weight, other = weights
    tensors: dict[str, Any] = {"K": (k, 2), "V": (v, 2), "KN": k_norm and (k_norm, 2)}
    tensors["A"] = weight and (weight, 1)
    tensors["B"] = other and (other, 1)
    operands = Operands(batch, tensors | written)
    strides = [f"{D * DV}", f"{DN}"]
    targets = ["STATE", "SUM" if normalized else "STATE"]
    slots = "1"
    if several:
        slots = operands.size("STATE", 2)
        strides, targets = [f"{width}"] * 2, ["STATE", f"STATE + {D * DV}"]
        if not arguments.is_static(M):
            rows = rows_text(operands.size("K", 2), slots, tile.BLOCK_N)
    length = operands.size("K", 2)
    if exact:  # a length that the compiler knows would undo the order of the sums (see state.py)
        length = f"({length} + tl.program_id(2))"
    launch.call(
        state.state_kernel,
        operands,
        [
            *(operands.pointer(name) for name in ("K", "V", "KN", "A", "B")),
            *targets,
            length,
            rows,
            slots,
            operands.inner,
            operands.strides("K"),
            operands.strides("V"),
            operands.strides("KN"),
            operands.strides("A", 3),
            *strides,
        ],
        {
            "D": D,
            "DV": DV,
            "DN": DN,
            "NORM": norm,
            "WEIGHT": arguments.weight_kind(weight),
            "EXACT": exact,
            "PRECISION": precision,
            "BIG": operands.big(tile.BLOCK_N),
        },
        {name: (text, "forward") for name, text in maps.items()},
        k.get_dtype(),
        tile,
        count * splits * tiles,
        [partial] if several else [sums, key_sum][: len(written)],
    )
    if several:
        add_splits(partial, sums, key_sum, normalized)
    return sums, key_sum


def rows_text(rows: str, splits: str, block: int) -> str:
    """The rows of one of `splits` programs, in whole tiles."""
    return f"({rows} + {splits} * {block} - 1) // ({splits} * {block}) * {block}"


def add_splits(partial: Node, sums: Node, key_sum: Node, normalized: bool) -> None:
    """state and key_sum = the sum over splits of `partial` (*batch, splits, both beside each
    other).
    """
    *batch, _, width = partial.get_size()
    tile = heuristics.SUM_TILE
    D, DV = (static(size) for size in sums.get_size()[-2:])
    sum_size = static(width) - D * DV
    tensors: dict[str, Any] = {"PARTIAL": (realized(partial), 2), "STATE": (realized(sums), 2)}
    if normalized:
        tensors["SUM"] = (realized(key_sum), 1)
    operands = Operands(batch, tensors)
    launch.call(
        state.sum_splits,
        operands,
        [
            "PARTIAL",
            "STATE",
            "SUM" if normalized else "STATE",
            operands.size("PARTIAL", 2),
        ],
        {"STATE_SIZE": D * DV, "SUM_SIZE": sum_size, "BLOCK": tile.BLOCK_N},
        {},
        torch.float32,
        tile,
        arguments.product(batch) * -(-(D * DV + sum_size) // tile.BLOCK_N),
        [sums, key_sum] if normalized else [sums],
    )
