"""state[c,d] = Σ_m k[m,c] · a[m] v[m,d]  and  key_sum[c] = Σ_m b[m] k'[m,c], a slice of the
sequence a program.

Shapes: k (B, M, D), v (B, M, Dv), k' (B, M, D') by strides; a, b (B, M) fp32, dense, or absent (1).
Each program reduces ROWS tokens for one tile of BLOCK_V value channels, and writes fp32 partial
sums; `sum_splits` adds them in order. D is one block, up to 256; the tiles of Dv re-read k, from L2
where they run together. The weights a, b make this the backward's dstate = Σ_n q (w·do) and
dkey_sum = Σ_n dz·q' for wide heads.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import product, tile_mask, tile_range


@triton.jit
def state_kernel(
    K, V, KN, A, B, STATE, SUM,
    M, ROWS, SPLITS, B1,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sn0, sn1, snn, snd,
    STATE_STRIDE, SUM_STRIDE,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,  # "none", "coupled" (k' is k) or "decoupled"
    WEIGHTED: tl.constexpr,
    EXACT: tl.constexpr,  # for a float32 result: add the tiles up on the CUDA cores
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
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

    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG) + tile * BLOCK_V
    first64 = first.to(tl.int64)
    k_ptr = K + b0 * sk0 + b1 * sk1 + first64 * skn
    v_ptr = V + b0 * sv0 + b1 * sv1 + first64 * svn
    k_offsets = rn[:, None] * skn + rd[None, :] * skd
    v_offsets = rn[:, None] * svn + rv[None, :] * svd
    if NORM == "decoupled":
        rdn = tile_range(BLOCK_DN, BIG)
        n_ptr = KN + b0 * sn0 + b1 * sn1 + first64 * snn
        n_offsets = rn[:, None] * snn + rdn[None, :] * snd
    if WEIGHTED:
        a_ptr = A + batch.to(tl.int64) * M + first
        b_ptr = B + batch.to(tl.int64) * M + first

    one = tl.where(M > 0, 1.0, 0.0)
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    key_sum = tl.zeros((BLOCK_DN,), tl.float32)
    for n in range(first, last, BLOCK_N):
        rows = n + rn
        k = tl.load(k_ptr + k_offsets, mask=tile_mask(rows, M, rd, D, BLOCK_D), other=0.0)
        v = tl.load(v_ptr + v_offsets, mask=tile_mask(rows, M, rv, DV, BLOCK_V * TILES), other=0.0)
        if WEIGHTED:
            a = tl.load(a_ptr + tl.arange(0, BLOCK_N), mask=rows < M, other=0.0)
            v = a[:, None] * v.to(tl.float32)
            a_ptr += BLOCK_N
        if EXACT:
            # Tensor cores cut off, rather than round, what does not fit beside the largest summand:
            # exact enough for one tile, a bias over thousands of tokens. The factor, 1, keeps
            # Triton from merging the sum into the dot.
            tile_state = tl.dot(tl.trans(k), v, tl.zeros((BLOCK_D, BLOCK_V), tl.float32))
            state += tile_state * one
        else:
            state = product(tl.trans(k), v, state, PRECISION)
        if NORM != "none":
            if NORM == "decoupled":
                kn = tl.load(
                    n_ptr + n_offsets, mask=tile_mask(rows, M, rdn, DN, BLOCK_DN), other=0.0
                )
                n_ptr += BLOCK_N * snn
                features = kn.to(tl.float32)
            else:
                features = k.to(tl.float32)
            if WEIGHTED:
                b = tl.load(b_ptr + tl.arange(0, BLOCK_N), mask=rows < M, other=0.0)
                features *= b[:, None]
                b_ptr += BLOCK_N
            key_sum += tl.sum(features, 0)
        k_ptr += BLOCK_N * skn
        v_ptr += BLOCK_N * svn

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


@triton.jit
def sum_splits(
    PARTIAL, STATE, SUM, SPLITS,
    STATE_SIZE: tl.constexpr, SUM_SIZE: tl.constexpr, BLOCK: tl.constexpr,
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
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, SPLITS):
        total += tl.load(pointer + i, mask=i < SIZE, other=0.0)
        pointer += SIZE
    tl.store(STATE + batch * STATE_SIZE + i, total, mask=i < STATE_SIZE)
    if SUM_SIZE > 0:
        j = i - STATE_SIZE
        tl.store(SUM + batch * SUM_SIZE + j, total, mask=(j >= 0) & (j < SUM_SIZE))
