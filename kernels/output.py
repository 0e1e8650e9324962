"""out[n,d] = scale · Σ_c xf[n,c] state[c,d] / guard(norm_scale · Σ_c qn[n,c] key_sum[c])  (+
bias[d]), xf = φ(x), any strides.

Shapes: x (B, N, D), q' (B, N, D'), out (B, N, Dv) by strides; state (.., D, Dv) and key_sum, bias
fp32. A program holds one tile of the state and walks over ROWS tokens. z, eps and the division stay
in fp32. The backward of wide heads uses it as well: dv = weight·(φ(k)·dstate), and dk =
φ'(k)·weight·(v·dstateᵀ + dkey_sum) with `bias`.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import (
    column_mask,
    guarded,
    held,
    in_columns,
    mapped,
    operand,
    product,
    scaled,
    split_product,
    sums_in_columns,
    through_map,
    tile_mask,
    tile_range,
)
from bla_inductor.kernels.overlap import launch_dependents, prefetch_rows, wait_for_previous
from bla_inductor.kernels.tiles import load_tile, tiles_of


@triton.jit
def held_for_output(
    state, key_sum, DTYPE: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(state, factor, key_sum, norm_factor) as `output_tile` wants them."""
    state, factor = held(state, 0, DTYPE, PRECISION)
    if NORMALIZER != "none" and sums_in_columns(PRECISION, DECOUPLED):
        key_sum, norm_factor = in_columns(key_sum, DTYPE)
        return state, factor, key_sum, norm_factor
    else:
        return state, factor, key_sum, 1.0


@triton.jit
def output_tile(
    x_tiles, n_ptr, state, factor, key_sum, norm_factor, left, scale, eps, sxn, sxd, snn, snd,
    D: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr,
    X_MAP: tl.constexpr, XN_MAP: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr, FULL: tl.constexpr,
    row=0, TMA: tl.constexpr = False,
):  # fmt: skip
    """scale · xf·state / guard(qn·key_sum) in fp32 of one tile, of which `left` rows are left.

    row: that of the tile, counted from the first of x_tiles (see tiles.py).
    """
    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    inside = rn < left
    x_mask = tile_mask(inside, rd, D, BLOCK_D, FULL)
    x = load_tile(x_tiles, row, 0, rn, rd, sxn, sxd, x_mask, TMA)
    DTYPE: tl.constexpr = x.dtype
    x = operand(x, column_mask(rd, D, BLOCK_D), X_MAP)
    w = tl.zeros((BLOCK_N,), tl.float32) + scale
    if NORMALIZER != "none":
        if sums_in_columns(PRECISION, DECOUPLED):
            z = tl.sum(tl.dot(x, key_sum), 1) * norm_factor
        else:
            if DECOUPLED:
                rdn = tile_range(BLOCK_DN, BIG)
                n_mask = tile_mask(inside, rdn, DN, BLOCK_DN, FULL)
                xn = tl.load(n_ptr + rn[:, None] * snn + rdn[None, :] * snd, mask=n_mask, other=0.0)
                xn = mapped(xn, column_mask(rdn, DN, BLOCK_DN), XN_MAP)
            else:
                xn = x.to(tl.float32)
            z = tl.sum(xn * key_sum[None, :], 1)
        w = scale / guarded(z, eps, NORMALIZER)
    zeros = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if PRECISION == "split":
        high, low = split_product(x, state, zeros)
        # Scaled one by one: Triton would turn high + low into one accumulator, which loses bits of
        # both.
        return high * w[:, None] + low * w[:, None]
    else:
        out = product(x, state, zeros, PRECISION)
        return scaled(out, factor, DTYPE, PRECISION) * w[:, None]


@triton.jit
def apply_state(
    x_ptr, n_ptr, o_ptr, w_ptr, r_ptr, g_ptr, state, key_sum, bias, first, last, tile,
    scale, eps,
    sxn, sxd, snn, snd, son, sod, swn, srn, srd,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    X_MAP: tl.constexpr, XN_MAP: tl.constexpr, OUT_MAP: tl.constexpr, OUT_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """Write rows first … last of out; the pointers are those of row `first`, key_sum includes
    norm_scale.
    """
    state, factor, key_sum, norm_factor = held_for_output(
        state, key_sum, x_ptr.dtype.element_ty, NORMALIZER, DECOUPLED, PRECISION
    )
    x_tiles = tiles_of(x_ptr, last - first, sxn, D, BLOCK_N, BLOCK_D, TMA)
    for n in range(0, last - first, BLOCK_N):
        _apply_to_tile(
            x_tiles, n_ptr, o_ptr, w_ptr,
            r_ptr, g_ptr, state, factor, key_sum, norm_factor, bias,
            n, last - first - n, tile, scale, eps, sxn, sxd, snn, snd, son, sod, swn, srn, srd,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
            NORMALIZER, DECOUPLED, HAS_BIAS, WEIGHT, WEIGHT_GRAD,
            X_MAP, XN_MAP, OUT_MAP, OUT_MAP_GRAD, PRECISION, BIG, TMA,
        )  # fmt: skip
        if not TMA:
            x_tiles += BLOCK_N * sxn
        n_ptr += BLOCK_N * snn
        o_ptr += BLOCK_N * son
        w_ptr += BLOCK_N * swn
        r_ptr += BLOCK_N * srn
        g_ptr += BLOCK_N


@triton.jit
def _apply_to_tile(
    x_tiles, n_ptr, o_ptr, w_ptr, r_ptr, g_ptr, state, factor, key_sum, norm_factor, bias, n, left,
    tile, scale, eps,
    sxn, sxd, snn, snd, son, sod, swn, srn, srd,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    X_MAP: tl.constexpr, XN_MAP: tl.constexpr, OUT_MAP: tl.constexpr, OUT_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write one tile of out, of which `left` rows are left."""
    TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    rn = tile_range(BLOCK_N, BIG)
    rv = tile_range(BLOCK_V, BIG) + tile * BLOCK_V
    inside = rn < left
    columns = column_mask(rv, DV, BLOCK_V * TILES)
    o_mask = tile_mask(inside, rv, DV, BLOCK_V * TILES, False)
    out = output_tile(
        x_tiles, n_ptr, state, factor, key_sum, norm_factor, left, scale, eps, sxn, sxd, snn, snd,
        D, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORMALIZER, DECOUPLED, X_MAP, XN_MAP, PRECISION, BIG, False, n, TMA,
    )  # fmt: skip
    if HAS_BIAS:
        out += bias[None, :]
    if WEIGHT_GRAD or OUT_MAP is not None or OUT_MAP_GRAD is not None:
        raw = tl.load(r_ptr + rn[:, None] * srn + rv[None, :] * srd, mask=o_mask, other=0.0)
    if WEIGHT_GRAD:
        dw = tl.sum(mapped(raw, columns, OUT_MAP) * out, 1)
        tl.store(g_ptr + rn, dw, mask=inside)
    if WEIGHT == "mask":
        kept = tl.load(w_ptr + rn * swn, mask=inside, other=0) != 0
        out = tl.where(kept[:, None], out, 0.0)
    elif WEIGHT == "float":
        out *= tl.load(w_ptr + rn * swn, mask=inside, other=0.0).to(tl.float32)[:, None]
    if OUT_MAP_GRAD is not None:
        out = through_map(raw, out, columns, OUT_MAP_GRAD)
    tl.store(
        o_ptr + rn[:, None] * son + rv[None, :] * sod, out.to(o_ptr.dtype.element_ty), mask=o_mask
    )


@triton.jit(do_not_specialize=["ROWS", "CHUNKS", "B1"])
def output_kernel(
    X, XN, OUT, STATE, SUM, BIAS, W, RAW, DW,
    N, ROWS, CHUNKS, B1, scale, norm_scale, eps,
    sx0, sx1, sxn, sxd,
    sn0, sn1, snn, snd,
    so0, so1, son, sod,
    ss0, ss1, ssc, ssd,
    sz0, sz1,
    sw0, sw1, swn,
    sr0, sr1, srn, srd,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DECOUPLED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,  # "none", "mask" or "float"
    WEIGHT_GRAD: tl.constexpr,  # DW (tiles, B, N) dense: this tile's part of Σ_d OUT_MAP(raw)·out
    X_MAP: tl.constexpr, XN_MAP: tl.constexpr,
    OUT_MAP: tl.constexpr, OUT_MAP_GRAD: tl.constexpr,  # of raw, which has out's shape
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
    TMA: tl.constexpr,  # see tiles.py
    PDL: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    # Inductor hands Python floats over as fp64.
    scale = tl.cast(scale, tl.float32)
    norm_scale = tl.cast(norm_scale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    pid = tl.program_id(0)
    tile = pid % TILES
    chunk = (pid // TILES) % CHUNKS
    batch = pid // TILES // CHUNKS
    batches = tl.num_programs(0) // TILES // CHUNKS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, N)
    first64 = first.to(tl.int64)

    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V) + tile * BLOCK_V
    cn = tl.arange(0, BLOCK_DN)
    x_ptr = X + b0 * sx0 + b1 * sx1 + first64 * sxn
    prefetch_rows(x_ptr, last - first, sxn, D, BLOCK_N)
    wait_for_previous(PDL)
    launch_dependents(PDL)
    state = tl.load(
        STATE + b0 * ss0 + b1 * ss1 + cd[:, None] * ssc + cv[None, :] * ssd,
        mask=(cd < D)[:, None] & (cv < DV)[None, :],
        other=0.0,
    )
    key_sum = scale
    bias = scale
    if NORMALIZER != "none":
        key_sum = tl.load(SUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0) * norm_scale
    if HAS_BIAS:
        bias = tl.load(BIAS + b0 * sz0 + b1 * sz1 + cv, mask=cv < DV, other=0.0)
    apply_state(
        x_ptr,
        XN + b0 * sn0 + b1 * sn1 + first64 * snn,
        OUT + b0 * so0 + b1 * so1 + first64 * son,
        W + b0 * sw0 + b1 * sw1 + first64 * swn,
        RAW + b0 * sr0 + b1 * sr1 + first64 * srn,
        DW + (tile * batches + batch).to(tl.int64) * N + first,
        state, key_sum, bias, first, last, tile, scale, eps,
        sxn, sxd, snn, snd, son, sod, swn, srn, srd,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORMALIZER, DECOUPLED, HAS_BIAS, WEIGHT, WEIGHT_GRAD,
        X_MAP, XN_MAP, OUT_MAP, OUT_MAP_GRAD, PRECISION, BIG, TMA,
    )  # fmt: skip
