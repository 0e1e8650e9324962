"""The kernels that write the result, as templates with an epilogue.

The result leaves through Inductor's `store_output`, tile by tile, so that what follows in the graph
(a gate, a residual, a cast, the change of layout) is computed before the store. The output's dims
are those of memory, outermost first, as Inductor fuses only what walks memory in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bla_inductor.kernels import heuristics, output, short_heuristics
from bla_inductor.kernels import state as state_kernels
from bla_inductor.kernels.heuristics import Tile
from bla_inductor.kernels.overlap import prefetch_rows
from bla_inductor.kernels.tiles import tiles_of
from bla_inductor.templates import arguments, launch
from bla_inductor.templates.arguments import empty
from bla_inductor.templates.operands import Expr, Node, Operands, equal, realized
from bla_inductor.templates.result import Result

if TYPE_CHECKING:
    from bla_inductor.templates.forward import Call

_FUNCTIONS = (output.held_for_output, output.output_tile, tiles_of, prefetch_rows, *launch.OVERLAP)

_PROGRAM = """
    TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    tile = pid % TILES
    chunk = pid // TILES % ({chunks})
    batch = pid // TILES // ({chunks})
    b0 = (batch // {inner}).to(tl.int64)
    b1 = (batch % {inner}).to(tl.int64)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, {length})
    scale = tl.cast({scale}, tl.float32)
    norm_scale = tl.cast({norm_scale}, tl.float32)
    eps = tl.cast({eps}, tl.float32)
    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V) + tile * BLOCK_V
    cn = tl.arange(0, BLOCK_DN)
    sx0, sx1, sxn, sxd = {x}
    first64 = first.to(tl.int64)
    x_ptr = X + b0 * sx0 + b1 * sx1 + first64 * sxn
"""
_AHEAD = "    prefetch_rows(x_ptr, last - first, sxn, D, BLOCK_N)"

_LOAD_STATE = """
    sc0, sc1, scc, scd = {state}
    key_sum = scale
    state = tl.load(
        STATE + b0 * sc0 + b1 * sc1 + cd[:, None] * scc + cv[None, :] * scd,
        mask=(cd < D)[:, None] & (cv < DV)[None, :],
        other=0.0,
    )
    if NORMALIZER != "none":
        sz0, sz1, szn = {key_sum}
        key_sum = tl.load({sum} + b0 * sz0 + b1 * sz1 + cn * szn, mask=cn < DN, other=0.0)
"""

_MAKE_STATE = """
    sk0, sk1, skn, skd = {k}
    sv0, sv1, svn, svd = {v}
    sn0, sn1, snn, snd = {kn}
    sa0, sa1, san = {a}
    a_ptr = {A} + b0 * sa0 + b1 * sa1
    state, key_sum = accumulate_state(
        K + b0 * sk0 + b1 * sk1, V + b0 * sv0 + b1 * sv1, {KN} + b0 * sn0 + b1 * sn1, a_ptr, a_ptr,
        0, {keys}, 0, skn, skd, svn, svd, snn, snd, san,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORM, WEIGHT, K_MAP, KN_MAP, EXACT, STATE_PRECISION, BIG,
    )
    if chunk == 0:
        batch64 = batch.to(tl.int64)
        tl.store(
            STATE + batch64 * (D * DV) + cd[:, None] * DV + cv[None, :],
            state,
            mask=(cd < D)[:, None] & (cv < DV)[None, :],
        )
        if NORM != "none":
            tl.store({sum} + batch64 * DN + cn, key_sum, mask=cn < DN)
"""

_TILES = """
    key_sum = key_sum * norm_scale
    state, factor, key_sum, norm_factor = held_for_output(
        state, key_sum, X.dtype.element_ty, NORMALIZER, DECOUPLED, PRECISION
    )
    sxn0, sxn1, sxnn, sxnd = {xn}
    n_ptr = {XN} + b0 * sxn0 + b1 * sxn1 + first64 * sxnn
    x_tiles = tiles_of(x_ptr, last - first, sxn, D, BLOCK_N, BLOCK_D, TMA)
    for n in range(first, last, BLOCK_N):
        out = output_tile(
            x_tiles, n_ptr, state, factor, key_sum, norm_factor, last - n, scale, eps,
            sxn, sxd, sxnn, sxnd, D, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
            NORMALIZER, DECOUPLED, X_MAP, XN_MAP, PRECISION, BIG, FULL, n - first, TMA,
        )
        if not TMA:
            x_tiles += BLOCK_N * sxn
        n_ptr += BLOCK_N * sxnn
        rows = n + tl.arange(0, BLOCK_N)
        out_mask = (rows < last)[:, None] & (cv < DV)[None, :]
{indices}
        {store}
"""


def _written_tiles(result: Result, operands: Operands, whole: bool) -> str:
    """whole: every row and column of every tile is one of the result."""
    indices, names = result.indices(operands)
    # Given no mask, Inductor takes that of its own loops, where it cannot prove that it needs none.
    mask = "None" if whole else "out_mask"
    store = (
        f'{{{{store_output(({names},), "out", "{mask}", indent_width=8, '
        'val_shape=("BLOCK_N", "BLOCK_V"))}}'
    )
    return _TILES.format(
        xn=operands.strides("XN"),
        XN=operands.pointer("XN"),
        indices=indices,
        store=store,
    )


def _program(call: Call, operands: Operands, chunks: str) -> str:
    scale, norm_scale, eps = (operands.expression(number) for number in call.x.numbers[1:])
    text = _PROGRAM.format(
        chunks=chunks,
        inner=operands.inner,
        length=operands.size("X", 2),
        scale=scale,
        norm_scale=norm_scale,
        eps=eps,
        x=operands.strides("X"),
    )
    return text + launch.overlap(operands, _AHEAD)


def _full(call: Call, tile: Tile) -> bool:
    """Whether every tile has all its rows."""
    return equal(call.N % tile.BLOCK_N, 0)


def _whole(call: Call, tile: Tile) -> bool:
    return _full(call, tile) and call.DV % tile.BLOCK_V == 0


def _constants(call: Call, tile: Tile, precision: str, each: int, big: bool) -> dict[str, Any]:
    """The compile-time names in the text; strings in quotes, since Inductor writes them as they
    are.
    """
    return {
        "D": call.D,
        "DV": call.DV,
        "DN": call.DN,
        **arguments.blocks(tile),
        "ROWS": each,
        "NORMALIZER": repr(call.x.normalizer),
        "DECOUPLED": call.x.q_norm is not None,
        "PRECISION": repr(precision),
        "BIG": big,
        "FULL": _full(call, tile),
        "TMA": tile.TMA,
    }


def _choices(
    call: Call, tile: Tile, constants: dict[str, Any]
) -> list[tuple[Tile, dict[str, Any]]]:
    """The heuristic's tile, then others that max-autotune may prefer, for the same grid."""
    tiles = [tile, replace(tile, num_warps=8 if tile.num_warps == 4 else 4)]
    tiles += [replace(tile, num_stages=stages) for stages in (1, 3) if stages != tile.num_stages]
    for rows in (tile.BLOCK_N // 2, tile.BLOCK_N * 2):
        alike = equal(call.N % rows, 0) == constants["FULL"]
        if rows >= 16 and constants["ROWS"] % rows == 0 and alike:
            tiles.append(replace(tile, BLOCK_N=rows))
    return [(t, {**constants, "BLOCK_N": t.BLOCK_N}) for t in tiles]


def apply_state(call: Call, dtype: torch.dtype, state: Node, key_sum: Node, precision: str) -> Node:
    """The result, from a state that another kernel has written."""
    x = call.x
    tensors: dict[str, Any] = {
        "X": (x.q, 2),
        "XN": x.q_norm and (x.q_norm, 2),
        "STATE": (state, 2),
        "SUM": (key_sum, 1) if x.normalized else None,
    }
    operands = Operands(call.query_batch, tensors)
    result = Result(call, dtype)
    tile = heuristics.output_tile(
        call.D, call.DV, call.DN, precision, heuristics.capability(call.device)
    )
    if x.q_norm is None:
        sizes = call.D, call.DV, call.DN
        elements = operands.count * call.N * call.D
        tile = arguments.for_large("output", tile, sizes, precision, elements, (x.q,))
    tiles = -(-call.DV // tile.BLOCK_V)
    each, chunks = arguments.divided(call.N, operands.count * tiles, tile, call.device)
    text = f"({operands.size('X', 2)} + ROWS - 1) // ROWS"
    maps = {"X_MAP": (call.maps["q"], "forward"), "XN_MAP": (call.maps["q_norm"], "forward")}
    loaded = _LOAD_STATE.format(
        state=operands.strides("STATE"),
        key_sum=operands.strides("SUM", 3),
        sum=operands.pointer("SUM"),
    )
    body = (
        _program(call, operands, text)
        + loaded
        + _written_tiles(result, operands, _whole(call, tile))
    )
    source = "\n".join(
        [launch.header(_FUNCTIONS, maps, call.dtype), launch.signature(operands.nodes), body]
    )
    constants = _constants(call, tile, precision, each, operands.big(tile.BLOCK_N))
    node = launch.choose(
        "output",
        source,
        operands,
        result.layout,
        _choices(call, tile, constants),
        operands.count * chunks * tiles,
    )
    return result.logical(node)


def short_forward(
    call: Call, dtype: torch.dtype, state_in: str, precision: str, exact: bool, parts: int
) -> tuple[Node, Node, Node]:
    """(out, state, key_sum) in one kernel: see `bla_inductor.kernels.short`."""
    x = call.x
    batch: list[Expr] = call.query_batch
    state = empty([*batch, call.D, call.DV], torch.float32, call.device)
    key_sum = empty([*batch, call.DN] if x.normalized else [0], torch.float32, call.device)
    tensors: dict[str, Any] = {
        "X": (x.q, 2),
        "K": (x.k, 2),
        "V": (x.v, 2),
        "XN": x.q_norm and (x.q_norm, 2),
        "KN": x.k_norm and (x.k_norm, 2),
        "A": x.key_weight and (x.key_weight, 1),
        "STATE": (realized(state), 2),
        "SUM": (realized(key_sum), 1) if x.normalized else None,
    }
    operands = Operands(batch, tensors)
    result = Result(call, dtype)
    tile = short_heuristics.short_tile(call.D, call.DV, call.DN, max(int(call.N), int(call.M)))
    each, parts = short_heuristics.equal_parts(int(call.N), parts, tile)
    maps = {
        "X_MAP": (call.maps["q"], "forward"),
        "K_MAP": (call.maps["k"], "forward"),
        "XN_MAP": (call.maps["q_norm"], "forward"),
        "KN_MAP": (call.maps["k_norm"], "forward"),
    }
    keys = operands.size("K", 2)
    made = _MAKE_STATE.format(
        k=operands.strides("K"),
        v=operands.strides("V"),
        kn=operands.strides("KN"),
        a=operands.strides("A", 3),
        A=operands.pointer("A"),
        KN=operands.pointer("KN"),
        # An upper bound that the compiler knows would undo the order of the sums.
        keys=f"({keys} + tl.program_id(2))" if exact else keys,
        sum=operands.pointer("SUM"),
    )
    body = (
        _program(call, operands, str(parts))
        + made
        + _written_tiles(result, operands, _whole(call, tile))
    )
    functions = (*_FUNCTIONS, state_kernels.accumulate_state)
    source = "\n".join(
        [launch.header(functions, maps, call.dtype), launch.signature(operands.nodes), body]
    )
    constants = _constants(call, tile, precision, each, operands.big(tile.BLOCK_N)) | {
        "NORM": repr(call.norm),
        "WEIGHT": repr(arguments.weight_kind(x.key_weight)),
        "EXACT": exact,
        "STATE_PRECISION": repr(state_in),
    }
    node = launch.choose(
        "forward",
        source,
        operands,
        result.layout,
        [(tile, constants)],
        operands.count * parts,
        [state, key_sum] if x.normalized else [state],
    )
    return result.logical(node), state, key_sum
