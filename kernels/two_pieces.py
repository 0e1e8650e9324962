"""The backward's passes for head dims of 64 and a few more: 80 = 64 + 16, 96 = 64 + 32.

Padded to the next power of two, 80 features cost the arithmetic, the registers and the feature maps
of 128. Here q, k, v and their gradients are tiles of P and of REST columns (the last masked), and a
D × D matrix is four blocks:

    S = | S11 S12 |   S11 P × P,  S22 REST × REST
        | S21 S22 |

For D = Dv, 16-bit tensors in their own arithmetic, maps of single elements, no key weights, and k'
that is k. Each function is what its namesake in query_pass.py or key_pass.py is. The state and the
output gained nothing from pieces (H100; docs/performance.md).
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import (
    add_product,
    guarded,
    held,
    in_columns,
    mapped,
    once,
    operand,
    through_guard,
    through_map,
    tile_range,
    weighted_rows,
)


@triton.jit
def _columns(P: tl.constexpr, REST: tl.constexpr, BIG: tl.constexpr):
    return tile_range(P, BIG)[None, :], (tile_range(REST, BIG) + P)[None, :]


@triton.jit
def _load(pointer, rn, inside, sn, sd, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
          BIG: tl.constexpr):  # fmt: skip
    c1, c2 = _columns(P, REST, BIG)
    rows = pointer + rn[:, None] * sn
    x1 = tl.load(rows + c1 * sd, mask=inside[:, None], other=0.0)
    x2 = tl.load(rows + c2 * sd, mask=inside[:, None] & (c2 < D), other=0.0)
    return x1, x2


@triton.jit
def _store(pointer, x1, x2, rn, inside, sn, sd, D: tl.constexpr, P: tl.constexpr,
           REST: tl.constexpr, BIG: tl.constexpr):  # fmt: skip
    c1, c2 = _columns(P, REST, BIG)
    rows = pointer + rn[:, None] * sn
    dtype = pointer.dtype.element_ty
    tl.store(rows + c1 * sd, x1.to(dtype), mask=inside[:, None])
    tl.store(rows + c2 * sd, x2.to(dtype), mask=inside[:, None] & (c2 < D))


@triton.jit
def _mapped_pieces(x1, x2, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
                   MAP: tl.constexpr):  # fmt: skip
    """φ in x's dtype."""
    c2 = tl.arange(0, REST)[None, :] + P
    return operand(x1, tl.full((1, 1), True, tl.int1), MAP), operand(x2, c2 < D, MAP)


@triton.jit
def _gradient_pieces(x1, x2, g1, g2, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
                     MAP_GRAD: tl.constexpr):  # fmt: skip
    c2 = tl.arange(0, REST)[None, :] + P
    g1 = through_map(x1, g1, tl.full((1, 1), True, tl.int1), MAP_GRAD)
    return g1, through_map(x2, g2, c2 < D, MAP_GRAD)


@triton.jit
def _load_blocks(pointer, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr):
    """The four blocks of a dense D × D matrix."""
    a = tl.arange(0, P)
    b = tl.arange(0, REST) + P
    s11 = tl.load(pointer + a[:, None] * D + a[None, :])
    s12 = tl.load(pointer + a[:, None] * D + b[None, :], mask=(b < D)[None, :], other=0.0)
    s21 = tl.load(pointer + b[:, None] * D + a[None, :], mask=(b < D)[:, None], other=0.0)
    both = (b < D)[:, None] & (b < D)[None, :]
    s22 = tl.load(pointer + b[:, None] * D + b[None, :], mask=both, other=0.0)
    return s11, s12, s21, s22


@triton.jit
def _store_blocks(pointer, s11, s12, s21, s22, D: tl.constexpr, P: tl.constexpr,
                  REST: tl.constexpr):  # fmt: skip
    a = tl.arange(0, P)
    b = tl.arange(0, REST) + P
    tl.store(pointer + a[:, None] * D + a[None, :], s11)
    tl.store(pointer + a[:, None] * D + b[None, :], s12, mask=(b < D)[None, :])
    tl.store(pointer + b[:, None] * D + a[None, :], s21, mask=(b < D)[:, None])
    both = (b < D)[:, None] & (b < D)[None, :]
    tl.store(pointer + b[:, None] * D + b[None, :], s22, mask=both)


@triton.jit
def _load_vector(pointer, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr):
    b = tl.arange(0, REST) + P
    return tl.load(pointer + tl.arange(0, P)), tl.load(pointer + b, mask=b < D, other=0.0)


@triton.jit
def _store_vector(pointer, x1, x2, D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr):
    b = tl.arange(0, REST) + P
    tl.store(pointer + tl.arange(0, P), x1)
    tl.store(pointer + b, x2, mask=b < D)


@triton.jit
def _chain(x1, b1, factor1, x2, b2, factor2, COLUMNS: tl.constexpr):
    """x1·b1 + x2·b2 in fp32 for `held` blocks b1, b2."""
    zeros = tl.zeros((x1.shape[0], COLUMNS), tl.float32)
    if x1.dtype == tl.float16:
        first = tl.dot(x1, b1, zeros) * factor1[None, :]
        return first + tl.dot(x2, b2, zeros) * factor2[None, :]
    else:
        return tl.dot(x2, b2, tl.dot(x1, b1, zeros))


@triton.jit
def query_pass_in_two(
    do_ptr, q_ptr, dq_ptr, state_ptr, sum_ptr, dstate_ptr, dsum_ptr, first, last,
    scale, norm_scale, eps, sgn, sgd, sqn, sqd, sdqn, sdqd,
    D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    NORMALIZER: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DSTATE: tl.constexpr, NEED_DSUM: tl.constexpr,
    Q_MAP: tl.constexpr, Q_MAP_GRAD: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    """Write dq of rows first … last, whose first the pointers are for, and their dstate, dsum."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    NEED_T: tl.constexpr = NEED_DQ or NORMALIZER != "none"
    if NEED_T:
        s11, s12, s21, s22 = _load_blocks(state_ptr, D, P, REST)
        t11, f11 = held(tl.trans(s11), 0, DTYPE, "native")
        t12, f12 = held(tl.trans(s12), 0, DTYPE, "native")
        t21, f21 = held(tl.trans(s21), 0, DTYPE, "native")
        t22, f22 = held(tl.trans(s22), 0, DTYPE, "native")
    if NORMALIZER != "none":
        sum1, sum2 = _load_vector(sum_ptr, D, P, REST)
        sum1 *= norm_scale
        sum2 *= norm_scale
    d11 = tl.zeros((P, P), tl.float32)
    d12 = tl.zeros((P, REST), tl.float32)
    d21 = tl.zeros((P, REST), tl.float32)  # transposed
    d22 = tl.zeros((REST, REST), tl.float32)
    dsum1 = tl.zeros((P, 16), tl.float32)
    dsum2 = tl.zeros((REST, 16), tl.float32)
    rn = tile_range(BLOCK_N, BIG)
    for n in range(0, last - first, BLOCK_N):
        inside = rn < last - first - n
        raw1, raw2 = _load(q_ptr, rn, inside, sqn, sqd, D, P, REST, BIG)
        do1, do2 = _load(do_ptr, rn, inside, sgn, sgd, D, P, REST, BIG)
        c2 = (tl.arange(0, REST) + P)[None, :]
        q1 = mapped(raw1, tl.full((1, 1), True, tl.int1), Q_MAP)
        q2 = mapped(raw2, c2 < D, Q_MAP)
        w = tl.zeros((BLOCK_N,), tl.float32) + scale
        if NEED_T:
            t1 = _chain(do1, t11, f11, do2, t12, f12, P)
            t2 = _chain(do1, t21, f21, do2, t22, f22, REST)
        if NORMALIZER != "none":
            z = tl.sum(q1 * sum1[None, :], 1) + tl.sum(q2 * sum2[None, :], 1)
            guard = tl.where(inside, guarded(z, eps, NORMALIZER), 1.0)
            w = scale / guard
            ratio = -(tl.sum(t1 * q1, 1) + tl.sum(t2 * q2, 1)) / guard
            ratio = through_guard(ratio, z, eps, NORMALIZER)
            dz = w * ratio
        if NEED_DQ:
            t1 *= w[:, None]
            t2 *= w[:, None]
            if NORMALIZER != "none":
                t1 += dz[:, None] * sum1[None, :]
                t2 += dz[:, None] * sum2[None, :]
            t1, t2 = _gradient_pieces(raw1, raw2, t1, t2, D, P, REST, Q_MAP_GRAD)
            _store(dq_ptr, t1, t2, rn, inside, sdqn, sdqd, D, P, REST, BIG)
        rows1, factor = weighted_rows(q1, w, raw1.dtype)
        rows2, _ = weighted_rows(q2, w, raw2.dtype)
        rows1 = once(rows1, Q_MAP)
        rows2 = once(rows2, Q_MAP)
        if NEED_DSTATE:
            d11 = add_product(rows1, do1, factor, d11)
            d12 = add_product(rows1, do2, factor, d12)
            d21 = add_product(do1, rows2, factor, d21)
            d22 = add_product(rows2, do2, factor, d22)
        if NEED_DSUM:
            parts, parts_factor = in_columns(ratio, raw1.dtype)
            dsum1 = add_product(rows1, parts, factor * parts_factor, dsum1)
            dsum2 = add_product(rows2, parts, factor * parts_factor, dsum2)
        q_ptr += BLOCK_N * sqn
        do_ptr += BLOCK_N * sgn
        dq_ptr += BLOCK_N * sdqn
    if NEED_DSTATE:
        _store_blocks(dstate_ptr, d11, d12, tl.trans(d21), d22, D, P, REST)
    if NEED_DSUM:
        dsum1_row = tl.sum(dsum1, 1) * norm_scale
        _store_vector(dsum_ptr, dsum1_row, tl.sum(dsum2, 1) * norm_scale, D, P, REST)


@triton.jit
def key_pass_in_two(
    k_ptr, v_ptr, dk_ptr, dv_ptr, dstate_ptr, dsum_ptr, first, last,
    skn, skd, svn, svd, sdkn, sdkd, sdvn, sdvd,
    D: tl.constexpr, P: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    K_MAP: tl.constexpr, K_MAP_GRAD: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    """Write dk, dv of rows first … last, whose first the pointers are for."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    d11, d12, d21, d22 = _load_blocks(dstate_ptr, D, P, REST)
    if NEED_DK:
        t11, ft11 = held(tl.trans(d11), 0, DTYPE, "native")
        t12, ft12 = held(tl.trans(d12), 0, DTYPE, "native")
        t21, ft21 = held(tl.trans(d21), 0, DTYPE, "native")
        t22, ft22 = held(tl.trans(d22), 0, DTYPE, "native")
    if NEED_DV:
        h11, fh11 = held(d11, 0, DTYPE, "native")
        h12, fh12 = held(d12, 0, DTYPE, "native")
        h21, fh21 = held(d21, 0, DTYPE, "native")
        h22, fh22 = held(d22, 0, DTYPE, "native")
    if NORM != "none":
        sum1, sum2 = _load_vector(dsum_ptr, D, P, REST)
    rn = tile_range(BLOCK_N, BIG)
    for n in range(0, last - first, BLOCK_N):
        inside = rn < last - first - n
        if NEED_DV or K_MAP_GRAD is not None:
            raw1, raw2 = _load(k_ptr, rn, inside, skn, skd, D, P, REST, BIG)
        if NEED_DK:
            v1, v2 = _load(v_ptr, rn, inside, svn, svd, D, P, REST, BIG)
            dk1 = _chain(v1, t11, ft11, v2, t12, ft12, P)
            dk2 = _chain(v1, t21, ft21, v2, t22, ft22, REST)
            if NORM != "none":
                dk1 += sum1[None, :]
                dk2 += sum2[None, :]
            if K_MAP_GRAD is not None:
                dk1, dk2 = _gradient_pieces(raw1, raw2, dk1, dk2, D, P, REST, K_MAP_GRAD)
            _store(dk_ptr, dk1, dk2, rn, inside, sdkn, sdkd, D, P, REST, BIG)
        if NEED_DV:
            k1, k2 = _mapped_pieces(raw1, raw2, D, P, REST, K_MAP)
            dv1 = _chain(k1, h11, fh11, k2, h21, fh21, P)
            dv2 = _chain(k1, h12, fh12, k2, h22, fh22, REST)
            _store(dv_ptr, dv1, dv2, rn, inside, sdvn, sdvd, D, P, REST, BIG)
        k_ptr += BLOCK_N * skn
        v_ptr += BLOCK_N * svn
        dk_ptr += BLOCK_N * sdkn
        dv_ptr += BLOCK_N * sdvn
