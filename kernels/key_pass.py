"""The backward's pass over k and v, for head dims up to 128.

With kf = φ(k), a key weight (1 if there is none) and dkf = v·dstateᵀ (+ dkey_sum where k' is k):
    dk = weight·dkf·φ'(k),  dv = weight·(kf·dstate),  dk' = weight·dkey_sum·φ'(k')
    dweight = rowsum(kf∘dkf)  (+ rowsum(kn∘dkey_sum) where k' is not k)
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from bla_inductor.kernels.common import (
    column_mask,
    held,
    mapped,
    operand,
    product,
    scaled,
    through_map,
    tile_mask,
    tile_range,
)
from bla_inductor.kernels.overlap import launch_dependents, wait_for_previous
from bla_inductor.kernels.two_pieces import key_pass_in_two


@triton.jit
def key_gradients(
    k_ptr, v_ptr, n_ptr, a_ptr, dk_ptr, dv_ptr, dn_ptr, da_ptr, dstate, dsum, first, last,
    skn, skd, svn, svd, snn, snd, san, sdkn, sdkd, sdvn, sdvd, sdnn, sdnd, sdan,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKN: tl.constexpr, NEED_DW: tl.constexpr,
    K_MAP: tl.constexpr, K_MAP_GRAD: tl.constexpr,
    KN_MAP: tl.constexpr, KN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    """Write the gradients of rows first … last, whose first the pointers are for."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    for_dk = dstate
    for_dv = dstate
    factor_dk = 1.0
    factor_dv = 1.0
    if NEED_DK or NEED_DW:
        for_dk, factor_dk = held(tl.trans(dstate), 0, DTYPE, PRECISION)
    if NEED_DV:
        for_dv, factor_dv = held(dstate, 0, DTYPE, PRECISION)
    for n in range(0, last - first, BLOCK_N):
        _write_tile(
            k_ptr, v_ptr, n_ptr, a_ptr,
            dk_ptr, dv_ptr, dn_ptr, da_ptr,
            for_dk, factor_dk, for_dv, factor_dv, dsum, last - first - n,
            skn, skd, svn, svd, snn, snd, san, sdkn, sdkd, sdvn, sdvd, sdnn, sdnd, sdan,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORM, WEIGHT,
            NEED_DK, NEED_DV, NEED_DKN, NEED_DW,
            K_MAP, K_MAP_GRAD, KN_MAP, KN_MAP_GRAD, PRECISION, BIG,
        )  # fmt: skip
        dk_ptr += BLOCK_N * sdkn
        dv_ptr += BLOCK_N * sdvn
        dn_ptr += BLOCK_N * sdnn
        da_ptr += BLOCK_N * sdan
        k_ptr += BLOCK_N * skn
        v_ptr += BLOCK_N * svn
        n_ptr += BLOCK_N * snn
        a_ptr += BLOCK_N * san


@triton.jit
def _write_tile(
    k_ptr, v_ptr, n_ptr, a_ptr, dk_ptr, dv_ptr, dn_ptr, da_ptr,
    for_dk, factor_dk, for_dv, factor_dv, dsum, left,
    skn, skd, svn, svd, snn, snd, san, sdkn, sdkd, sdvn, sdvd, sdnn, sdnd, sdan,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKN: tl.constexpr, NEED_DW: tl.constexpr,
    K_MAP: tl.constexpr, K_MAP_GRAD: tl.constexpr,
    KN_MAP: tl.constexpr, KN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile, of which `left` rows are left."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    NEED_K: tl.constexpr = NEED_DV or NEED_DW or (NEED_DK and K_MAP_GRAD is not None)
    NEED_KN: tl.constexpr = NORM == "decoupled" and (
        NEED_DW or (NEED_DKN and KN_MAP_GRAD is not None)
    )
    rn = tile_range(BLOCK_N, BIG)
    rd = tile_range(BLOCK_D, BIG)
    rv = tile_range(BLOCK_V, BIG)
    rdn = tile_range(BLOCK_DN, BIG)
    columns = column_mask(rd, D, BLOCK_D)
    columns_n = column_mask(rdn, DN, BLOCK_DN)
    rows = rn < left
    inside = rows
    if WEIGHT == "mask":
        inside = rows & (tl.load(a_ptr + rn * san, mask=rows, other=0) != 0)
    elif WEIGHT == "float":
        a = tl.load(a_ptr + rn * san, mask=rows, other=0.0).to(tl.float32)
    k_mask = tile_mask(inside, rd, D, BLOCK_D, False)
    v_mask = tile_mask(inside, rv, DV, BLOCK_V, False)
    n_mask = tile_mask(inside, rdn, DN, BLOCK_DN, False)
    if NEED_K:
        raw = tl.load(k_ptr + rn[:, None] * skn + rd[None, :] * skd, mask=k_mask, other=0.0)
        k = operand(raw, columns, K_MAP)
    if NEED_KN:
        raw_n = tl.load(n_ptr + rn[:, None] * snn + rdn[None, :] * snd, mask=n_mask, other=0.0)
    if NEED_DW:
        dw = tl.zeros((BLOCK_N,), tl.float32)
    if NEED_DK or NEED_DW:
        v = tl.load(v_ptr + rn[:, None] * svn + rv[None, :] * svd, mask=v_mask, other=0.0)
        dk = product(v, for_dk, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION)
        dk = scaled(dk, factor_dk, DTYPE, PRECISION)
        if NORM == "coupled":
            dk += dsum[None, :]
        if NEED_DW:
            dw += tl.sum(k.to(tl.float32) * dk, 1)
        if NEED_DK:
            if WEIGHT == "float":
                dk *= a[:, None]
            if K_MAP_GRAD is not None:
                dk = through_map(raw, dk, columns, K_MAP_GRAD)
            if WEIGHT == "mask":
                dk = tl.where(inside[:, None], dk, 0.0)
            tl.store(
                dk_ptr + rn[:, None] * sdkn + rd[None, :] * sdkd,
                dk.to(dk_ptr.dtype.element_ty),
                mask=tile_mask(rows, rd, D, BLOCK_D, False),
            )
    if NEED_DV:
        dv = product(k, for_dv, tl.zeros((BLOCK_N, BLOCK_V), tl.float32), PRECISION)
        dv = scaled(dv, factor_dv, DTYPE, PRECISION)
        if WEIGHT == "float":
            dv *= a[:, None]
        elif WEIGHT == "mask":
            dv = tl.where(inside[:, None], dv, 0.0)
        tl.store(
            dv_ptr + rn[:, None] * sdvn + rv[None, :] * sdvd,
            dv.to(dv_ptr.dtype.element_ty),
            mask=tile_mask(rows, rv, DV, BLOCK_V, False),
        )
    if NORM == "decoupled":
        if NEED_DW:
            dw += tl.sum(mapped(raw_n, columns_n, KN_MAP) * dsum[None, :], 1)
        if NEED_DKN:
            dkn = tl.zeros((BLOCK_N, BLOCK_DN), tl.float32) + dsum[None, :]
            if WEIGHT == "float":
                dkn *= a[:, None]
            if KN_MAP_GRAD is not None:
                dkn = through_map(raw_n, dkn, columns_n, KN_MAP_GRAD)
            if WEIGHT == "mask":
                dkn = tl.where(inside[:, None], dkn, 0.0)
            tl.store(
                dn_ptr + rn[:, None] * sdnn + rdn[None, :] * sdnd,
                dkn.to(dn_ptr.dtype.element_ty),
                mask=tile_mask(rows, rdn, DN, BLOCK_DN, False),
            )
    if NEED_DW:
        tl.store(da_ptr + rn * sdan, dw.to(da_ptr.dtype.element_ty), mask=rows)


@triton.jit(do_not_specialize=["ROWS", "CHUNKS", "B1"])
def key_pass_kernel(
    K, V, KN, A, DK, DV_OUT, DKN, DA, DSTATE, DSUM,
    M, ROWS, CHUNKS, B1,
    sk0, sk1, skn, skd,
    sv0, sv1, svn, svd,
    sn0, sn1, snn, snd,
    sa0, sa1, san,
    sdk0, sdk1, sdkn, sdkd,
    sdv0, sdv1, sdvn, sdvd,
    sdn0, sdn1, sdnn, sdnd,
    sda0, sda1, sdan,
    ss0, ss1, sz0, sz1,
    D: tl.constexpr, DV: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_DN: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,  # "none", "coupled" (k' is k) or "decoupled"
    WEIGHT: tl.constexpr,  # "none", "mask" or "float"
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKN: tl.constexpr, NEED_DW: tl.constexpr,
    K_MAP: tl.constexpr, K_MAP_GRAD: tl.constexpr,
    KN_MAP: tl.constexpr, KN_MAP_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    REST: tl.constexpr,  # columns beyond BLOCK_D and BLOCK_V: see two_pieces.py
    BIG: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    batch = pid // CHUNKS
    b0 = (batch // B1).to(tl.int64)
    b1 = (batch % B1).to(tl.int64)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, M)
    first64 = first.to(tl.int64)
    wait_for_previous(PDL)
    launch_dependents(PDL)
    if REST > 0:
        key_pass_in_two(
            K + b0 * sk0 + b1 * sk1 + first64 * skn,
            V + b0 * sv0 + b1 * sv1 + first64 * svn,
            DK + b0 * sdk0 + b1 * sdk1 + first64 * sdkn,
            DV_OUT + b0 * sdv0 + b1 * sdv1 + first64 * sdvn,
            DSTATE + b0 * ss0 + b1 * ss1, DSUM + b0 * sz0 + b1 * sz1,
            first, last, skn, skd, svn, svd, sdkn, sdkd, sdvn, sdvd,
            D, BLOCK_D, REST, BLOCK_N, NORM, NEED_DK, NEED_DV, K_MAP, K_MAP_GRAD, BIG,
        )  # fmt: skip
    else:
        cd = tl.arange(0, BLOCK_D)
        cv = tl.arange(0, BLOCK_V)
        cn = tl.arange(0, BLOCK_DN)
        dstate = tl.load(
            DSTATE + b0 * ss0 + b1 * ss1 + cd[:, None] * DV + cv[None, :],
            mask=(cd < D)[:, None] & (cv < DV)[None, :],
            other=0.0,
        )
        dsum = 0.0
        if NORM != "none":
            dsum = tl.load(DSUM + b0 * sz0 + b1 * sz1 + cn, mask=cn < DN, other=0.0)
        key_gradients(
            K + b0 * sk0 + b1 * sk1 + first64 * skn,
            V + b0 * sv0 + b1 * sv1 + first64 * svn,
            KN + b0 * sn0 + b1 * sn1 + first64 * snn,
            A + b0 * sa0 + b1 * sa1 + first64 * san,
            DK + b0 * sdk0 + b1 * sdk1 + first64 * sdkn,
            DV_OUT + b0 * sdv0 + b1 * sdv1 + first64 * sdvn,
            DKN + b0 * sdn0 + b1 * sdn1 + first64 * sdnn,
            DA + b0 * sda0 + b1 * sda1 + first64 * sdan,
            dstate, dsum, first, last,
            skn, skd, svn, svd, snn, snd, san, sdkn, sdkd, sdvn, sdvd, sdnn, sdnd, sdan,
            D, DV, DN, BLOCK_D, BLOCK_V, BLOCK_DN, BLOCK_N, NORM, WEIGHT,
            NEED_DK, NEED_DV, NEED_DKN, NEED_DW,
            K_MAP, K_MAP_GRAD, KN_MAP, KN_MAP_GRAD, PRECISION, BIG,
        )  # fmt: skip
