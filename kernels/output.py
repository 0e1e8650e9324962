"""out[n,d] = scale · Σ_c x[n,c] state[c,d] / guard(norm_scale · Σ_c q'[n,c] key_sum[c])  (+
bias[d]), any strides.

Shapes: x (B, N, D), q' (B, N, D'), out (B, N, Dv) by strides; state (.., D, Dv) and key_sum, bias
fp32. A program holds one tile of the state and walks over ROWS tokens. z, eps and the division stay
in fp32. The backward of wide heads uses it as well: dv = k·dstate, and dk = v·dstateᵀ + dkey_sum
with `bias`.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import guarded, product, split_product, tile_mask, tile_range


@triton.jit
def output_kernel(
    X, XN, OUT, STATE, SUM, BIAS,
    N, ROWS, CHUNKS, B1, scale, norm_scale, eps,
    sx0, sx1, sxn, sxd,
    sn0, sn1, snn, snd,
    so0, so1, son, sod,
    ss0, ss1, ssc, ssd,
    sz0, sz1,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr,
    DECOUPLED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BIG: tl.constexpr,
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
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, N)

    cd = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_V) + tile * BLOCK_V
    state = tl.load(
        STATE + b0 * ss0 + b1 * ss1 + cd[:, None] * ssc + cv[None, :] * ssd,
        mask=(cd < D)[:, None] & (cv < DV)[None, :],
        other=0.0,
    )
    if NORMALIZER != "none":
        cn = tl.arange(0, BLOCK_DN)
        key_sum = tl.load(SUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0)
        key_sum *= norm_scale
    if HAS_BIAS:
        bias = tl.load(BIAS + b0 * sz0 + b1 * sz1 + cv, mask=cv < DV, other=0.0)

    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG) + tile * BLOCK_V
    first64 = first.to(tl.int64)
    x_ptr = X + b0 * sx0 + b1 * sx1 + first64 * sxn
    o_ptr = OUT + b0 * so0 + b1 * so1 + first64 * son
    x_offsets = rn[:, None] * sxn + rd[None, :] * sxd
    o_offsets = rn[:, None] * son + rv[None, :] * sod
    if DECOUPLED:
        rdn = tile_range(BLOCK_DN, BIG)
        n_ptr = XN + b0 * sn0 + b1 * sn1 + first64 * snn
        n_offsets = rn[:, None] * snn + rdn[None, :] * snd

    for n in range(first, last, BLOCK_N):
        rows = n + rn
        x = tl.load(x_ptr + x_offsets, mask=tile_mask(rows, N, rd, D, BLOCK_D), other=0.0)
        factor = tl.zeros((BLOCK_N,), tl.float32) + scale
        if NORMALIZER != "none":
            if DECOUPLED:
                xn = tl.load(
                    n_ptr + n_offsets, mask=tile_mask(rows, N, rdn, DN, BLOCK_DN), other=0.0
                )
                n_ptr += BLOCK_N * snn
            else:
                xn = x
            z = tl.sum(xn.to(tl.float32) * key_sum[None, :], 1)
            factor = scale / guarded(z, eps, NORMALIZER)
        zeros = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if PRECISION == "split":
            high, low = split_product(x, state, zeros)
            # Scaled one by one: Triton would turn high + low into one accumulator, which loses bits
            # of both.
            out = high * factor[:, None] + low * factor[:, None]
        else:
            out = product(x, state, zeros, PRECISION) * factor[:, None]
        if HAS_BIAS:
            out += bias[None, :]
        tl.store(
            o_ptr + o_offsets,
            out.to(OUT.dtype.element_ty),
            mask=tile_mask(rows, N, rv, DV, BLOCK_V * TILES),
        )
        x_ptr += BLOCK_N * sxn
        o_ptr += BLOCK_N * son
