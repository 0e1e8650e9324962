"""Short sequences in one launch: every program of a head makes the whole state, then works on its
own rows.

The first of a head's PARTS programs reads k and v (backward: q and do) from memory and the others
find them in L2, so this pays while reading a head takes about as long as a launch. Head dims up to
128, in one block; q, k and v with the same batch dims.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.key_pass import key_gradients
from bla_inductor.kernels.output import apply_state
from bla_inductor.kernels.overlap import launch_dependents, prefetch_rows, wait_for_previous
from bla_inductor.kernels.query_pass import query_gradients
from bla_inductor.kernels.state import accumulate_state


@triton.jit(do_not_specialize=["ROWS", "PARTS", "B1"])
def short_forward_kernel(
    Q, K, V, QN, KN, A, OUT, STATE, SUM,
    N, M, ROWS, PARTS, B1, scale, norm_scale, eps,
    sq0, sq1, sqn, sqd,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sx0, sx1, sxn, sxd,
    sn0, sn1, snn, snd,
    sa0, sa1, san,
    so0, so1, son, sod,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, NORM: tl.constexpr, DECOUPLED: tl.constexpr, WEIGHT: tl.constexpr,
    Q_MAP: tl.constexpr, K_MAP: tl.constexpr, QN_MAP: tl.constexpr, KN_MAP: tl.constexpr,
    EXACT: tl.constexpr, STATE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    BIG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    norm_scale = tl.cast(norm_scale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    pid = tl.program_id(0)
    part = pid % PARTS
    batch = pid // PARTS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    a_ptr = A + b0 * sa0 + b1 * sa1
    first = part * ROWS
    last = tl.minimum(first + ROWS, N)
    first64 = first.to(tl.int64)
    q_ptr = Q + b0 * sq0 + b1 * sq1 + first64 * sqn
    prefetch_rows(q_ptr, last - first, sqn, D, BLOCK_N)
    wait_for_previous(PDL)
    launch_dependents(PDL)
    state, key_sum = accumulate_state(
        K + b0 * sk0 + b1 * sk1,
        V + b0 * sv0 + b1 * sv1,
        KN + b0 * sn0 + b1 * sn1,
        a_ptr, a_ptr, 0, M, 0, skn, skd, svn, svd, snn, snd, san,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORM, WEIGHT, K_MAP, KN_MAP, EXACT, STATE_PRECISION, BIG,
    )  # fmt: skip
    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V)
    cn = tl.arange(0, BLOCK_DN)
    batch64 = batch.to(tl.int64)
    if part == 0:
        tl.store(
            STATE + batch64 * (D * DV) + cd[:, None] * DV + cv[None, :],
            state,
            mask=(cd < D)[:, None] & (cv < DV)[None, :],
        )
        if NORM != "none":
            tl.store(SUM + batch64 * DN + cn, key_sum, mask=cn < DN)
    o_ptr = OUT + b0 * so0 + b1 * so1 + first64 * son
    apply_state(
        q_ptr,
        QN + b0 * sx0 + b1 * sx1 + first64 * sxn,
        o_ptr, a_ptr, o_ptr, o_ptr,
        state, key_sum * norm_scale, 0.0, first, last, 0, scale, eps,
        sqn, sqd, sxn, sxd, son, sod, 0, 0, 0,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N,
        NORMALIZER, DECOUPLED, False, "none", False,
        Q_MAP, QN_MAP, None, None, PRECISION, BIG,
    )  # fmt: skip


@triton.jit(do_not_specialize=["QUERY_ROWS", "KEY_ROWS", "PARTS", "B1"])
def short_backward_kernel(
    DO, Q, K, V, QN, KN, A, DQ, DK, DV_OUT, DQN, DKN, DA, STATE, SUM,
    N, M, QUERY_ROWS, KEY_ROWS, PARTS, B1, scale, norm_scale, eps,
    sg0, sg1, sgn, sgd,
    sq0, sq1, sqn, sqd,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sx0, sx1, sxn, sxd,
    sn0, sn1, snn, snd,
    sa0, sa1, san,
    sdq0, sdq1, sdqn, sdqd,
    sdk0, sdk1, sdkn, sdkd,
    sdv0, sdv1, sdvn, sdvd,
    sdx0, sdx1, sdxn, sdxd,
    sdn0, sdn1, sdnn, sdnd,
    sda0, sda1, sdan,
    ss0, ss1, sz0, sz1,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr, NORM: tl.constexpr, DECOUPLED: tl.constexpr, WEIGHT: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DQN: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKN: tl.constexpr, NEED_DW: tl.constexpr,
    Q_MAP: tl.constexpr, Q_MAP_GRAD: tl.constexpr,
    K_MAP: tl.constexpr, K_MAP_GRAD: tl.constexpr,
    QN_MAP: tl.constexpr, QN_MAP_GRAD: tl.constexpr,
    KN_MAP: tl.constexpr, KN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    norm_scale = tl.cast(norm_scale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    pid = tl.program_id(0)
    part = pid % PARTS
    batch = pid // PARTS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V)
    cn = tl.arange(0, BLOCK_DN)
    first = part * KEY_ROWS
    last = tl.minimum(first + KEY_ROWS, M)
    first64 = first.to(tl.int64)
    k_ptr = K + b0 * sk0 + b1 * sk1 + first64 * skn
    v_ptr = V + b0 * sv0 + b1 * sv1 + first64 * svn
    prefetch_rows(k_ptr, last - first, skn, D, BLOCK_N)
    prefetch_rows(v_ptr, last - first, svn, DV, BLOCK_N)
    wait_for_previous(PDL)
    launch_dependents(PDL)
    state = scale
    key_sum = scale
    if NEED_DQ or NORMALIZER != "none":
        state = tl.load(
            STATE + b0 * ss0 + b1 * ss1 + cd[:, None] * DV + cv[None, :],
            mask=(cd < D)[:, None] & (cv < DV)[None, :],
            other=0.0,
        )
    if NORMALIZER != "none":
        key_sum = tl.load(SUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0) * norm_scale
    q_ptr = Q + b0 * sq0 + b1 * sq1
    dstate, dsum = query_gradients(
        DO + b0 * sg0 + b1 * sg1,
        q_ptr,
        QN + b0 * sx0 + b1 * sx1,
        DQ + b0 * sdq0 + b1 * sdq1,
        DQN + b0 * sdx0 + b1 * sdx1,
        q_ptr, q_ptr, state, key_sum, 0, N,
        part * QUERY_ROWS, (part + 1) * QUERY_ROWS, scale, norm_scale, eps,
        sgn, sgd, sqn, sqd, sxn, sxd, sdqn, sdqd, sdxn, sdxd,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORMALIZER, DECOUPLED,
        NEED_DQ, NEED_DQN, True, NORM != "none", False, True,
        Q_MAP, Q_MAP_GRAD, QN_MAP, QN_MAP_GRAD, PRECISION, BIG,
    )  # fmt: skip
    key_gradients(
        k_ptr,
        v_ptr,
        KN + b0 * sn0 + b1 * sn1 + first64 * snn,
        A + b0 * sa0 + b1 * sa1 + first64 * san,
        DK + b0 * sdk0 + b1 * sdk1 + first64 * sdkn,
        DV_OUT + b0 * sdv0 + b1 * sdv1 + first64 * sdvn,
        DKN + b0 * sdn0 + b1 * sdn1 + first64 * sdnn,
        DA + b0 * sda0 + b1 * sda1 + first64 * sdan,
        dstate, dsum * norm_scale, first, last,
        skn, skd, svn, svd, snn, snd, san, sdkn, sdkd, sdvn, sdvd, sdnn, sdnd, sdan,
        D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORM, WEIGHT,
        NEED_DK, NEED_DV, NEED_DKN, NEED_DW,
        K_MAP, K_MAP_GRAD, KN_MAP, KN_MAP_GRAD, PRECISION, BIG,
    )  # fmt: skip
