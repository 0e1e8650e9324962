"""state[c,d] = Σ_m kf[m,c] · a[m] v[m,d]  and  key_sum[c] = Σ_m b[m] kn[m,c], with kf = φ(k), a
slice of the sequence a program.

Shapes: k (B, M, D), v (B, M, Dv), k' (B, M, D'), weights a, b (B, M), all by strides. A boolean
weight is part of the mask: rows that it drops are not read. Each program reduces ROWS tokens for
one tile of BLOCK_V value channels, and writes fp32 partial sums; `sum_splits` adds them in order. D
is one block, up to 256; the tiles of Dv re-read k, from L2 where they run together. Two different
weights make this the backward's dstate = Σ_n φ(q) (w·do) and dkey_sum = Σ_n dz·q' for wide heads.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import (
    add_product,
    column_mask,
    in_columns,
    mapped,
    operand,
    product,
    tile_mask,
    tile_range,
    weighted_rows,
    whole_sums,
)
from bla_inductor.kernels.overlap import launch_dependents, wait_for_previous
from bla_inductor.kernels.tiles import load_tile, tiles_of


@triton.jit
def accumulate_state(
    k_ptr, v_ptr, n_ptr, a_ptr, b_ptr, first, last, tile,
    skn, skd, svn, svd, snn, snd, san,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, K_MAP: tl.constexpr, KN_MAP: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BIG: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(state, key_sum) of rows first … last; the pointers are those of row `first`. No TMA where
    WEIGHT is a mask: rows that it drops are not read.
    """
    # A product with `in_columns`, where the user's graph rounds the sum to 16 bits anyway.
    TENSOR_SUMS: tl.constexpr = NORM == "coupled" and PRECISION == "native" and not EXACT
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    if TENSOR_SUMS:
        sums = tl.zeros((BLOCK_D, 16), tl.float32)
    else:  # one row of sums for each row of a tile: added up across threads at the end only
        sums = tl.zeros((BLOCK_N, BLOCK_DN), tl.float32)
    k_tiles = tiles_of(k_ptr, last - first, skn, D, BLOCK_N, BLOCK_D, TMA)
    v_tiles = tiles_of(v_ptr, last - first, svn, DV, BLOCK_N, BLOCK_V, TMA)
    for n in range(0, last - first, BLOCK_N):
        state, sums = _add_tile(
            k_tiles, v_tiles, n_ptr, a_ptr,
            b_ptr, state, sums, n, last - first - n, tile,
            skn, skd, svn, svd, snn, snd, san,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
            NORM, WEIGHT, K_MAP, KN_MAP, EXACT, PRECISION, BIG, TENSOR_SUMS, TMA,
        )  # fmt: skip
        if not TMA:
            k_tiles += BLOCK_N * skn
            v_tiles += BLOCK_N * svn
        n_ptr += BLOCK_N * snn
        a_ptr += BLOCK_N * san
        b_ptr += BLOCK_N * san
    return whole_sums(state, sums, D, DN, BLOCK_D, BLOCK_DN, TENSOR_SUMS)


@triton.jit
def _add_tile(
    k_tiles, v_tiles, n_ptr, a_ptr, b_ptr, state, sums, n, left, tile,
    skn, skd, svn, svd, snn, snd, san,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, K_MAP: tl.constexpr, KN_MAP: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BIG: tl.constexpr,
    TENSOR_SUMS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """state and sums with the tile of row n added, of which `left` rows are left."""
    TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG) + tile * BLOCK_V
    inside = rn < left
    if WEIGHT == "mask":
        inside = inside & (tl.load(a_ptr + rn * san, mask=inside, other=0) != 0)
    elif WEIGHT == "float":
        a = tl.load(a_ptr + rn * san, mask=inside, other=0.0).to(tl.float32)
    k_mask = tile_mask(inside, rd, D, BLOCK_D, False)
    v_mask = tile_mask(inside, rv, DV, BLOCK_V * TILES, False)
    k = load_tile(k_tiles, n, 0, rn, rd, skn, skd, k_mask, TMA)
    v = load_tile(v_tiles, n, tile * BLOCK_V, rn, rv, svn, svd, v_mask, TMA)
    # Beyond the last row v and b are 0.
    k = operand(k, column_mask(rd, D, BLOCK_D), K_MAP)
    if WEIGHT == "float":
        if PRECISION == "native":
            rows, factor = weighted_rows(k.to(tl.float32), a, k.dtype)
            state = add_product(rows, v, factor, state)
        else:
            state = product(tl.trans(k), v.to(tl.float32) * a[:, None], state, PRECISION)
    elif EXACT:
        # Tensor cores cut off, rather than round, what does not fit beside the largest summand:
        # exact enough for one tile, a bias over thousands of tokens. The factor, 1, keeps Triton
        # from merging the sum into the dot.
        one = tl.where(left > 0, 1.0, 0.0)
        state += tl.dot(tl.trans(k), v, tl.zeros((BLOCK_D, BLOCK_V), tl.float32)) * one
    else:
        state = product(tl.trans(k), v, state, PRECISION)
    if NORM != "none":
        if WEIGHT == "float":
            b = tl.load(b_ptr + rn * san, mask=inside, other=0.0).to(tl.float32)
        else:
            b = tl.where(inside, 1.0, 0.0)
        if TENSOR_SUMS:
            if WEIGHT == "float":
                parts, factor = in_columns(b, k.dtype)
                sums = add_product(k, parts, factor, sums)
            else:
                first_column = (tl.arange(0, 16) == 0)[None, :]
                ones = tl.where(inside[:, None] & first_column, 1.0, 0.0).to(k.dtype)
                sums = tl.dot(tl.trans(k), ones, sums)
        else:
            if NORM == "decoupled":
                rdn = tile_range(BLOCK_DN, BIG)
                n_mask = tile_mask(inside, rdn, DN, BLOCK_DN, False)
                kn = tl.load(n_ptr + rn[:, None] * snn + rdn[None, :] * snd, mask=n_mask, other=0.0)
                features = mapped(kn, column_mask(rdn, DN, BLOCK_DN), KN_MAP)
            else:
                features = k.to(tl.float32)
            features *= b[:, None]
            sums += features
    return state, sums


@triton.jit(do_not_specialize=["ROWS", "SPLITS", "B1"])
def state_kernel(
    K, V, KN, A, B, STATE, SUM,
    M, ROWS, SPLITS, B1,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sn0, sn1, snn, snd,
    sa0, sa1, san,
    STATE_STRIDE, SUM_STRIDE,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,  # "none", "coupled" (k' is k) or "decoupled"
    WEIGHT: tl.constexpr,  # "none", "mask" or "float"
    K_MAP: tl.constexpr, KN_MAP: tl.constexpr,
    EXACT: tl.constexpr,  # for a float32 result: add the tiles up on the CUDA cores
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
    TMA: tl.constexpr,  # see tiles.py
    PDL: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    tile = pid % TILES
    slot = pid // TILES  # the partial sum that this program writes
    split = slot % SPLITS
    batch = slot // SPLITS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = split * ROWS
    last = tl.minimum(first + ROWS, M)
    first64 = first.to(tl.int64)
    wait_for_previous(PDL)
    launch_dependents(PDL)
    state, key_sum = accumulate_state(
        K + b0 * sk0 + b1 * sk1 + first64 * skn,
        V + b0 * sv0 + b1 * sv1 + first64 * svn,
        KN + b0 * sn0 + b1 * sn1 + first64 * snn,
        A + b0 * sa0 + b1 * sa1 + first64 * san,
        B + b0 * sa0 + b1 * sa1 + first64 * san,
        first, last, tile, skn, skd, svn, svd, snn, snd, san,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORM, WEIGHT, K_MAP, KN_MAP, EXACT, PRECISION, BIG, TMA,
    )  # fmt: skip
    slot64 = slot.to(tl.int64)
    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V) + tile * BLOCK_V
    tl.store(
        STATE + slot64 * STATE_STRIDE + cd[:, None] * DV + cv[None, :],
        state,
        mask=(cd < D)[:, None] & (cv < DV)[None, :],
    )
    if NORM != "none" and tile == 0:
        cn = tl.arange(0, BLOCK_DN)
        tl.store(SUM + slot64 * SUM_STRIDE + cn, key_sum, mask=cn < DN)


@triton.jit(do_not_specialize=["SPLITS"])
def sum_splits(
    PARTIAL, STATE, SUM, SPLITS,
    STATE_SIZE: tl.constexpr, SUM_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """STATE (B, STATE_SIZE), SUM (B, SUM_SIZE) = the sum over splits of PARTIAL (B, SPLITS,
    STATE_SIZE + SUM_SIZE).
    """
    SIZE: tl.constexpr = STATE_SIZE + SUM_SIZE
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    batch = (pid // BLOCKS).to(tl.int64)
    i = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    pointer = PARTIAL + batch * SPLITS * SIZE
    wait_for_previous(PDL)
    launch_dependents(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, SPLITS):
        total += tl.load(pointer + i, mask=i < SIZE, other=0.0)
        pointer += SIZE
    tl.store(STATE + batch * STATE_SIZE + i, total, mask=i < STATE_SIZE)
    if SUM_SIZE > 0:
        j = i - STATE_SIZE
        tl.store(SUM + batch * SUM_SIZE + j, total, mask=(j >= 0) & (j < SUM_SIZE))
