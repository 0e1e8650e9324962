"""The backward's pass over q and do, for head dims up to 128.

With qf = φ(q), qn = φ'(q') (or qf), w = scale/guard(z), z = norm_scale·qn·key_sum, t = do·stateᵀ:
    dqf = w·t,  dz = -norm_scale·w·rowsum(t∘qf)/guard(z),  dqn = dz·key_sum   (dqf + dqn where qn is
    qf), each through the derivative of its map
    dstate = Σ_n qf (w·do),  dkey_sum = Σ_n dz·qn      by splits of the sequence
rowsum(do∘out) is w·rowsum(t∘qf), so the output is neither saved nor read. Statistics are fp32.
Where the state and dstate do not fit into registers together, the pass stores w and norm_scale·dz
per token, and `state_kernel` sums dstate and dkey_sum from these weights in a pass of its own.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import (
    add_product,
    column_mask,
    guarded,
    held,
    in_columns,
    mapped,
    once,
    operand,
    product,
    scaled,
    sums_in_columns,
    through_guard,
    through_map,
    tile_mask,
    tile_range,
    weighted_rows,
    whole_sums,
)
from bla_inductor.kernels.overlap import launch_dependents, wait_for_previous
from bla_inductor.kernels.tiles import load_tile, tiles_of
from bla_inductor.kernels.two_pieces import query_pass_in_two


@triton.jit
def query_gradients(
    do_ptr, q_ptr, n_ptr, dq_ptr, dn_ptr, w_ptr, z_ptr, state, key_sum, first, last,
    own_first, own_last, scale, norm_scale, eps,
    sgn, sgd, sqn, sqd, snn, snd, sdqn, sdqd, sdnn, sdnd,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DQN: tl.constexpr,
    NEED_DSTATE: tl.constexpr, NEED_DSUM: tl.constexpr,
    STORE_WEIGHTS: tl.constexpr, PARTIAL: tl.constexpr,
    Q_MAP: tl.constexpr, Q_MAP_GRAD: tl.constexpr,
    QN_MAP: tl.constexpr, QN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(dstate, dkey_sum / norm_scale) of rows first … last, whose first the pointers are for.

    Writes their dq, dq', if PARTIAL only of those in own_first … own_last. key_sum includes
    norm_scale.
    """
    NEED_T: tl.constexpr = NEED_DQ or NORMALIZER != "none"
    TENSOR_SUMS: tl.constexpr = NORMALIZER != "none" and sums_in_columns(PRECISION, DECOUPLED)
    factor = 1.0
    if NEED_T:
        state, factor = held(tl.trans(state), 0, do_ptr.dtype.element_ty, PRECISION)
    dstate = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    if TENSOR_SUMS:
        sums = tl.zeros((BLOCK_D, 16), tl.float32)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_DN), tl.float32)
    do_tiles = tiles_of(do_ptr, last - first, sgn, DV, BLOCK_N, BLOCK_V, TMA)
    q_tiles = tiles_of(q_ptr, last - first, sqn, D, BLOCK_N, BLOCK_D, TMA)
    for n in range(0, last - first, BLOCK_N):
        dstate, sums = _tile_gradients(
            do_tiles, q_tiles, n_ptr,
            dq_ptr, dn_ptr, w_ptr, z_ptr,
            state, factor, key_sum, dstate, sums, last - first - n,
            n, own_first, own_last, scale, norm_scale, eps,
            sgn, sgd, sqn, sqd, snn, snd, sdqn, sdqd, sdnn, sdnd,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORMALIZER, DECOUPLED,
            NEED_DQ, NEED_DQN, NEED_DSTATE, NEED_DSUM, STORE_WEIGHTS, PARTIAL,
            Q_MAP, Q_MAP_GRAD, QN_MAP, QN_MAP_GRAD, PRECISION, BIG, TENSOR_SUMS, TMA,
        )  # fmt: skip
        if not TMA:
            do_tiles += BLOCK_N * sgn
            q_tiles += BLOCK_N * sqn
        dq_ptr += BLOCK_N * sdqn
        dn_ptr += BLOCK_N * sdnn
        n_ptr += BLOCK_N * snn
        w_ptr += BLOCK_N
        z_ptr += BLOCK_N
    return whole_sums(dstate, sums, D, DN, BLOCK_D, BLOCK_DN, TENSOR_SUMS)


@triton.jit
def _tile_gradients(
    do_tiles, q_tiles, n_ptr, dq_ptr, dn_ptr, w_ptr, z_ptr,
    state, factor, key_sum, dstate, sums, left, n, own_first, own_last,
    scale, norm_scale, eps,
    sgn, sgd, sqn, sqd, snn, snd, sdqn, sdqd, sdnn, sdnd,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, DECOUPLED: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DQN: tl.constexpr,
    NEED_DSTATE: tl.constexpr, NEED_DSUM: tl.constexpr,
    STORE_WEIGHTS: tl.constexpr, PARTIAL: tl.constexpr,
    Q_MAP: tl.constexpr, Q_MAP_GRAD: tl.constexpr,
    QN_MAP: tl.constexpr, QN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr, TENSOR_SUMS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dstate and sums with one tile added, of which `left` rows are left; writes its dq, dq', if
    PARTIAL only of the rows within own_first … own_last, counted from the first tile as n is.
    """
    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG)
    rdn = tile_range(BLOCK_DN, BIG)
    inside = rn < left
    q_mask = tile_mask(inside, rd, D, BLOCK_D, False)
    do_mask = tile_mask(inside, rv, DV, BLOCK_V, False)
    raw = load_tile(q_tiles, n, 0, rn, rd, sqn, sqd, q_mask, TMA)
    do = load_tile(do_tiles, n, 0, rn, rv, sgn, sgd, do_mask, TMA)
    columns_inside = column_mask(rd, D, BLOCK_D)
    q = mapped(raw, columns_inside, Q_MAP)
    if NEED_DQ or NORMALIZER != "none":
        t = product(do, state, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION)
        t = scaled(t, factor, do.dtype, PRECISION)
    w = tl.zeros((BLOCK_N,), tl.float32) + scale
    if NORMALIZER != "none":
        if DECOUPLED:
            n_mask = tile_mask(inside, rdn, DN, BLOCK_DN, False)
            n_offsets = rn[:, None] * snn + rdn[None, :] * snd
            raw_n = tl.load(n_ptr + n_offsets, mask=n_mask, other=0.0)
            qn = mapped(raw_n, column_mask(rdn, DN, BLOCK_DN), QN_MAP)
        else:
            qn = q
        z = tl.sum(qn * key_sum[None, :], 1)
        # Rows beyond the last must not turn 0/0 into NaN in the sums over n; do is 0 there.
        guard = tl.where(inside, guarded(z, eps, NORMALIZER), 1.0)
        w = scale / guard
        ratio = -tl.sum(t * q, 1) / guard
        ratio = through_guard(ratio, z, eps, NORMALIZER)
        dz = w * ratio
        if NEED_DQ:
            t *= w[:, None]
            if not DECOUPLED:
                t += dz[:, None] * key_sum[None, :]
        if NEED_DQN:
            dqn = dz[:, None] * key_sum[None, :]
            dqn = through_map(raw_n, dqn, column_mask(rdn, DN, BLOCK_DN), QN_MAP_GRAD)
            dn_offsets = rn[:, None] * sdnn + rdn[None, :] * sdnd
            if PARTIAL:
                own = inside & (n + rn >= own_first) & (n + rn < own_last)
                n_mask = tile_mask(own, rdn, DN, BLOCK_DN, False)
            tl.store(dn_ptr + dn_offsets, dqn.to(dn_ptr.dtype.element_ty), mask=n_mask)
        if NEED_DSUM and not TENSOR_SUMS:
            sums += qn * dz[:, None]
        if STORE_WEIGHTS:
            rows = tl.arange(0, BLOCK_N)
            tl.store(w_ptr + rows, w, mask=inside)
            tl.store(z_ptr + rows, dz * norm_scale, mask=inside)
    elif NEED_DQ:
        t *= scale
    if NEED_DQ:
        t = through_map(raw, t, columns_inside, Q_MAP_GRAD)
        dq_offsets = rn[:, None] * sdqn + rd[None, :] * sdqd
        if PARTIAL:
            own = inside & (n + rn >= own_first) & (n + rn < own_last)
            q_mask = tile_mask(own, rd, D, BLOCK_D, False)
        tl.store(dq_ptr + dq_offsets, t.to(dq_ptr.dtype.element_ty), mask=q_mask)
    if PRECISION == "native":
        # w·q rather than w·do: do goes from memory to the tensor cores untouched.
        rows, factor = weighted_rows(q, w, raw.dtype)
        rows = once(rows, Q_MAP)
        if NEED_DSTATE:
            dstate = add_product(rows, do, factor, dstate)
        if TENSOR_SUMS and NEED_DSUM:
            parts, parts_factor = in_columns(ratio, raw.dtype)
            sums = add_product(rows, parts, factor * parts_factor, sums)
    else:
        rows = operand(raw, columns_inside, Q_MAP)
        if NEED_DSTATE:
            dstate = product(tl.trans(rows), do.to(tl.float32) * w[:, None], dstate, PRECISION)
        if TENSOR_SUMS and NEED_DSUM:
            parts, factor = in_columns(dz, raw.dtype)
            sums = add_product(rows, parts, factor, sums)
    return dstate, sums


@triton.jit(do_not_specialize=["ROWS", "SPLITS", "B1"])
def query_pass_kernel(
    DO, Q, QN, DQ, DQN, STATE, SUM, DSTATE, DSUM, W, DZ,
    N, ROWS, SPLITS, B1, scale, norm_scale, eps,
    sg0, sg1, sgn, sgd,
    sq0, sq1, sqn, sqd,
    sn0, sn1, snn, snd,
    sdq0, sdq1, sdqn, sdqd,
    sdn0, sdn1, sdnn, sdnd,
    ss0, ss1, sz0, sz1,
    DSTATE_STRIDE, DSUM_STRIDE,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DECOUPLED: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DQN: tl.constexpr,
    NEED_DSTATE: tl.constexpr, NEED_DSUM: tl.constexpr,
    STORE_WEIGHTS: tl.constexpr,
    Q_MAP: tl.constexpr, Q_MAP_GRAD: tl.constexpr,
    QN_MAP: tl.constexpr, QN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    REST: tl.constexpr,  # columns beyond BLOCK_D and BLOCK_V: see two_pieces.py
    BIG: tl.constexpr,
    TMA: tl.constexpr,  # see tiles.py
    PDL: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    norm_scale = tl.cast(norm_scale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    slot = tl.program_id(0)
    split = slot % SPLITS
    batch = slot // SPLITS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = split * ROWS
    last = tl.minimum(first + ROWS, N)
    first64 = first.to(tl.int64)
    wait_for_previous(PDL)
    launch_dependents(PDL)

    slot64 = slot.to(tl.int64)
    if REST > 0:
        query_pass_in_two(
            DO + b0 * sg0 + b1 * sg1 + first64 * sgn,
            Q + b0 * sq0 + b1 * sq1 + first64 * sqn,
            DQ + b0 * sdq0 + b1 * sdq1 + first64 * sdqn,
            STATE + b0 * ss0 + b1 * ss1, SUM + b0 * sz0 + b1 * sz1,
            DSTATE + slot64 * DSTATE_STRIDE, DSUM + slot64 * DSUM_STRIDE,
            first, last, scale, norm_scale, eps, sgn, sgd, sqn, sqd, sdqn, sdqd,
            D, BLOCK_D, REST, BLOCK_N, NORMALIZER,
            NEED_DQ, NEED_DSTATE, NEED_DSUM, Q_MAP, Q_MAP_GRAD, BIG,
        )  # fmt: skip
    else:
        cd = tl.arange(0, BLOCK_D)
        cv = tl.arange(0, BLOCK_V)
        cn = tl.arange(0, BLOCK_DN)
        state_mask = (cd < D)[:, None] & (cv < DV)[None, :]
        state_offsets = cd[:, None] * DV + cv[None, :]
        state = scale
        key_sum = scale
        if NEED_DQ or NORMALIZER != "none":
            state = tl.load(STATE + b0 * ss0 + b1 * ss1 + state_offsets, mask=state_mask, other=0.0)
        if NORMALIZER != "none":
            key_sum = tl.load(SUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0) * norm_scale
        row = batch.to(tl.int64) * N + first
        dstate, dsum = query_gradients(
            DO + b0 * sg0 + b1 * sg1 + first64 * sgn,
            Q + b0 * sq0 + b1 * sq1 + first64 * sqn,
            QN + b0 * sn0 + b1 * sn1 + first64 * snn,
            DQ + b0 * sdq0 + b1 * sdq1 + first64 * sdqn,
            DQN + b0 * sdn0 + b1 * sdn1 + first64 * sdnn,
            W + row, DZ + row, state, key_sum, first, last, 0, 0, scale, norm_scale, eps,
            sgn, sgd, sqn, sqd, snn, snd, sdqn, sdqd, sdnn, sdnd,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORMALIZER, DECOUPLED,
            NEED_DQ, NEED_DQN, NEED_DSTATE, NEED_DSUM, STORE_WEIGHTS, False,
            Q_MAP, Q_MAP_GRAD, QN_MAP, QN_MAP_GRAD, PRECISION, BIG, TMA,
        )  # fmt: skip
        if NEED_DSTATE:
            tl.store(DSTATE + slot64 * DSTATE_STRIDE + state_offsets, dstate, mask=state_mask)
        if NEED_DSUM:
            tl.store(DSUM + slot64 * DSUM_STRIDE + cn, dsum * norm_scale, mask=cn < DN)
