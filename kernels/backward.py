"""The backward for head dims up to 128: one pass over q and do, one over k and v.

With w = scale/guard(z), z = norm_scale·q'·key_sum, t = do·stateᵀ:
    query pass: dq = w·t,  dz = -norm_scale·w·rowsum(t∘q)/guard(z),  dq' = dz·key_sum    (dq + dq'
    where q' is q)
                dstate = Σ_n q (w·do),  dkey_sum = Σ_n dz·q'      by splits of the sequence
    key pass:   dk = v·dstateᵀ,  dv = k·dstate,  dk' = dkey_sum                        (dk + dk'
    where k' is k)
rowsum(do∘out) is w·rowsum(t∘q), so the output is neither saved nor read. Statistics are fp32.
Where the state and dstate do not fit into registers together, the query pass stores w and
norm_scale·dz per token, and `state_kernel` sums dstate and dkey_sum from these weights in a pass of
its own.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import guarded, product, tile_mask, tile_range


@triton.jit
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
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
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

    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V)
    cn = tl.arange(0, BLOCK_DN)
    state_mask = (cd < D)[:, None] & (cv < DV)[None, :]
    state_offsets = cd[:, None] * DV + cv[None, :]
    if NEED_DQ or NORMALIZER != "none":
        state = tl.load(STATE + b0 * ss0 + b1 * ss1 + state_offsets, mask=state_mask, other=0.0)
    if NORMALIZER != "none":
        key_sum = tl.load(SUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0) * norm_scale

    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG)
    rdn = tile_range(BLOCK_DN, BIG)
    first64 = first.to(tl.int64)
    do_ptr = DO + b0 * sg0 + b1 * sg1 + first64 * sgn
    q_ptr = Q + b0 * sq0 + b1 * sq1 + first64 * sqn
    dq_ptr = DQ + b0 * sdq0 + b1 * sdq1 + first64 * sdqn
    qn_ptr = QN + b0 * sn0 + b1 * sn1 + first64 * snn
    dqn_ptr = DQN + b0 * sdn0 + b1 * sdn1 + first64 * sdnn
    do_offsets = rn[:, None] * sgn + rv[None, :] * sgd
    q_offsets = rn[:, None] * sqn + rd[None, :] * sqd
    dq_offsets = rn[:, None] * sdqn + rd[None, :] * sdqd
    qn_offsets = rn[:, None] * snn + rdn[None, :] * snd
    dqn_offsets = rn[:, None] * sdnn + rdn[None, :] * sdnd

    dstate = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    dsum = tl.zeros((BLOCK_DN,), tl.float32)
    for n in range(first, last, BLOCK_N):
        rows = n + rn
        q_mask = tile_mask(rows, N, rd, D, BLOCK_D)
        q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
        do = tl.load(do_ptr + do_offsets, mask=tile_mask(rows, N, rv, DV, BLOCK_V), other=0.0)
        if NEED_DQ or NORMALIZER != "none":
            t = product(do, tl.trans(state), tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION)
        if NORMALIZER != "none":
            qn_mask = tile_mask(rows, N, rdn, DN, BLOCK_DN)
            if DECOUPLED:
                qn = tl.load(qn_ptr + qn_offsets, mask=qn_mask, other=0.0).to(tl.float32)
            else:
                qn = q.to(tl.float32)
            z = tl.sum(qn * key_sum[None, :], 1)
            # Rows beyond N must not turn 0/0 into NaN in the sums over n.
            guard = tl.where(rows < N, guarded(z, eps, NORMALIZER), 1.0)
            w = scale / guard
            dz = -w * tl.sum(t * q.to(tl.float32), 1) / guard
            if NORMALIZER == "clamp":
                dz = tl.where(z >= eps, dz, 0.0)
            weighted_do = do.to(tl.float32) * w[:, None]
            if NEED_DQ:
                t *= w[:, None]
                if not DECOUPLED:
                    t += dz[:, None] * key_sum[None, :]
            if NEED_DQN:
                dqn = dz[:, None] * key_sum[None, :]
                tl.store(dqn_ptr + dqn_offsets, dqn.to(DQN.dtype.element_ty), mask=qn_mask)
            if NEED_DSUM:
                dsum += tl.sum(qn * dz[:, None], 0)
            if STORE_WEIGHTS:
                row = batch.to(tl.int64) * N + n + tl.arange(0, BLOCK_N)
                tl.store(W + row, w, mask=rows < N)
                tl.store(DZ + row, dz * norm_scale, mask=rows < N)
        else:
            weighted_do = do.to(tl.float32) * scale
            if NEED_DQ:
                t *= scale
        if NEED_DQ:
            tl.store(dq_ptr + dq_offsets, t.to(DQ.dtype.element_ty), mask=q_mask)
        if NEED_DSTATE:
            dstate = product(tl.trans(q), weighted_do, dstate, PRECISION)
        do_ptr += BLOCK_N * sgn
        q_ptr += BLOCK_N * sqn
        dq_ptr += BLOCK_N * sdqn
        qn_ptr += BLOCK_N * snn
        dqn_ptr += BLOCK_N * sdnn

    slot64 = slot.to(tl.int64)
    if NEED_DSTATE:
        tl.store(DSTATE + slot64 * DSTATE_STRIDE + state_offsets, dstate, mask=state_mask)
    if NEED_DSUM:
        tl.store(DSUM + slot64 * DSUM_STRIDE + cn, dsum * norm_scale, mask=cn < DN)


@triton.jit
def key_pass_kernel(
    K, V, DK, DV_OUT, DKN, DSTATE, DSUM,
    M, ROWS, CHUNKS, B1,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sdk0, sdk1, sdkn, sdkd,
    sdv0, sdv1, sdvn, sdvd,
    sdn0, sdn1, sdnn, sdnd,
    ss0, ss1, sz0, sz1,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKN: tl.constexpr,
    ADD_DSUM: tl.constexpr,  # k' is k: dk takes dkey_sum
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    batch = pid // CHUNKS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, M)

    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V)
    dstate = tl.load(
        DSTATE + b0 * ss0 + b1 * ss1 + cd[:, None] * DV + cv[None, :],
        mask=(cd < D)[:, None] & (cv < DV)[None, :],
        other=0.0,
    )
    if ADD_DSUM:
        dsum = tl.load(DSUM + b0 * sz0 + b1 * sz1 + cd, mask=cd < D, other=0.0)
    if NEED_DKN:
        cn = tl.arange(0, BLOCK_DN)
        dkn = tl.load(DSUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0)

    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG)
    rdn = tile_range(BLOCK_DN, BIG)
    first64 = first.to(tl.int64)
    k_ptr = K + b0 * sk0 + b1 * sk1 + first64 * skn
    v_ptr = V + b0 * sv0 + b1 * sv1 + first64 * svn
    dk_ptr = DK + b0 * sdk0 + b1 * sdk1 + first64 * sdkn
    dv_ptr = DV_OUT + b0 * sdv0 + b1 * sdv1 + first64 * sdvn
    dkn_ptr = DKN + b0 * sdn0 + b1 * sdn1 + first64 * sdnn
    k_offsets = rn[:, None] * skn + rd[None, :] * skd
    v_offsets = rn[:, None] * svn + rv[None, :] * svd
    dk_offsets = rn[:, None] * sdkn + rd[None, :] * sdkd
    dv_offsets = rn[:, None] * sdvn + rv[None, :] * sdvd
    dkn_offsets = rn[:, None] * sdnn + rdn[None, :] * sdnd

    for n in range(first, last, BLOCK_N):
        rows = n + rn
        k_mask = tile_mask(rows, M, rd, D, BLOCK_D)
        v_mask = tile_mask(rows, M, rv, DV, BLOCK_V)
        if NEED_DK:
            v = tl.load(v_ptr + v_offsets, mask=v_mask, other=0.0)
            dk = product(v, tl.trans(dstate), tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION)
            if ADD_DSUM:
                dk += dsum[None, :]
            tl.store(dk_ptr + dk_offsets, dk.to(DK.dtype.element_ty), mask=k_mask)
        if NEED_DV:
            k = tl.load(k_ptr + k_offsets, mask=k_mask, other=0.0)
            dv = product(k, dstate, tl.zeros((BLOCK_N, BLOCK_V), tl.float32), PRECISION)
            tl.store(dv_ptr + dv_offsets, dv.to(DV_OUT.dtype.element_ty), mask=v_mask)
        if NEED_DKN:
            tl.store(
                dkn_ptr + dkn_offsets,
                tl.zeros((BLOCK_N, BLOCK_DN), DKN.dtype.element_ty)
                + dkn[None, :].to(DKN.dtype.element_ty),
                mask=tile_mask(rows, M, rdn, DN, BLOCK_DN),
            )
        k_ptr += BLOCK_N * skn
        v_ptr += BLOCK_N * svn
        dk_ptr += BLOCK_N * sdkn
        dv_ptr += BLOCK_N * sdvn
        dkn_ptr += BLOCK_N * sdnn
