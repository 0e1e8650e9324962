"""What the kernels share: tiles with masks, feature maps, matrix products at a stated precision,
the guard of the normaliser.
"""

# mypy: disable-error-code="no-untyped-def"
import os

import triton
import triton.language as tl

from bla_inductor.compat import clamp_is_flat_at_its_bounds

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FLAT_AT_BOUND = tl.constexpr(clamp_is_flat_at_its_bounds())


@triton.jit
def tile_range(SIZE: tl.constexpr, BIG: tl.constexpr):
    """0 … SIZE-1; in int64 with BIG, for tensors whose offsets within one tile leave int32."""
    r = tl.arange(0, SIZE)
    if BIG:
        r = r.to(tl.int64)
    return r


@triton.jit
def tile_mask(inside, cols, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """[rows, cols] of the rows that are `inside`, FULL if all are; without the tests that cannot
    fail.
    """
    if D == BLOCK_D:
        if FULL:
            return tl.full((1, 1), True, tl.int1)
        else:
            return inside[:, None]
    elif FULL:
        return (cols < D)[None, :]
    else:
        return inside[:, None] & (cols < D)[None, :]


@triton.jit
def column_mask(cols, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1, cols] for the row-wise stages of feature maps."""
    if D == BLOCK_D:
        return tl.full((1, 1), True, tl.int1)
    else:
        return (cols < D)[None, :]


@triton.jit
def mapped(x, mask, MAP: tl.constexpr):
    """MAP(x) in fp32 (None: x itself). Outside of `mask`, where x is loaded with 0, the result is
    some number: see feature_map.py.
    """
    if MAP is None:
        return x.to(tl.float32)
    else:
        return MAP(x.to(tl.float32), mask)


@triton.jit
def operand(x, mask, MAP: tl.constexpr):
    """MAP(x) in x's dtype, as the user's graph rounds it before a product."""
    if MAP is None:
        return x
    else:
        return MAP(x.to(tl.float32), mask).to(x.dtype)


@triton.jit
def once(x, MAP: tl.constexpr):
    """x = MAP(…), computed once. Triton prefers to evaluate cheap arithmetic again in every layout
    that it is used in, which for an exp is dearer than the way through shared memory; it leaves
    alone what might have side effects.
    """
    if MAP is None or x.dtype == tl.float32 or INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )


@triton.jit
def through_map(x, g, mask, MAP_GRAD: tl.constexpr):
    """g · MAP'(x) in fp32."""
    if MAP_GRAD is None:
        return g
    else:
        return MAP_GRAD(x.to(tl.float32), g, mask)


@triton.jit
def round_tf32(x):
    """x in fp32, rounded to the nearest value of 11 significant bits: tensor cores would cut off
    the rest instead.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def apart(x):
    """A product's result, kept from becoming the accumulator of another one: Triton turns
    a·b + (c·d) into one chain of products.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def power_to_fit(largest):
    """The power of two that brings `largest` (fp32, ≥ 0) into [2^14, 2^15), and its inverse."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -100), 127)
    down = ((127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    up = ((127 - 14 + exponent) << 23).to(tl.float32, bitcast=True)
    return down, up


@triton.jit
def held(b, AXIS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix in fp32 that many tiles are multiplied by: (as `product` wants it, factor).

    native: rounded to DTYPE. A state may leave fp16 on either side, so there each line along AXIS,
    the axis that a product sums over, is brought to 2^14 by a power of two; what a product has to
    be multiplied by is the factor, a vector along the other axis.   tf32: rounded.   Otherwise b.
    The factor is 1 but for fp16.
    """
    if PRECISION == "native":
        if tl.float16 == DTYPE:
            down, up = power_to_fit(tl.max(tl.abs(b), AXIS))
            return (b * tl.expand_dims(down, AXIS)).to(DTYPE), up
        else:
            return b.to(DTYPE), 1.0
    elif PRECISION == "tf32":
        return round_tf32(b), 1.0
    else:
        return b, 1.0


@triton.jit
def scaled(x, factor, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x [rows, cols] times the factor of `held`, along the columns."""
    if PRECISION == "native" and tl.float16 == DTYPE:
        return x * factor[None, :]
    else:
        return x


@triton.jit
def in_parts(x):
    """x in fp32 as three bf16 summands: 24 bits."""
    high = x.to(tl.bfloat16)
    # What is not finite has one part: inf - inf would be NaN.
    rest = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), x - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in fp32, for b an input tile or `held`.

    native: in a's 16-bit type.   tf32: both rounded to tf32.   ieee: fp32 on the CUDA cores.
    pair: b in fp32 as two bf16 parts beside a in bf16.   tf32x2: as two tf32 parts beside a 16-bit
    a.   parts: fp32 as three bf16 parts each; see
    `split_product`.
    """
    if PRECISION == "native":
        return tl.dot(a, b.to(a.dtype), acc)
    elif PRECISION == "tf32":
        a = a.to(tl.float32) if a.dtype != tl.float32 else round_tf32(a)
        b = b.to(tl.float32) if b.dtype != tl.float32 else round_tf32(b)
        return tl.dot(a, b, acc, input_precision="tf32")
    elif PRECISION == "pair":
        high, middle, _ = in_parts(b)
        return tl.dot(a, high, tl.dot(a, middle, acc))
    elif PRECISION == "tf32x2":
        a = a.to(tl.float32)
        high = round_tf32(b.to(tl.float32))
        low = b.to(tl.float32) - high
        return tl.dot(a, high, tl.dot(a, low, acc, input_precision="tf32"), input_precision="tf32")
    elif PRECISION == "parts" and not INTERPRETED:  # whose products of bf16 are wrong
        a_high, a_middle, a_low = in_parts(a.to(tl.float32))
        b_high, b_middle, b_low = in_parts(b.to(tl.float32))
        zeros = tl.zeros(acc.shape, tl.float32)
        rest = tl.dot(a_middle, b_middle, zeros)
        rest = tl.dot(a_low, b_high, tl.dot(a_high, b_low, rest))
        rest = tl.dot(a_middle, b_high, tl.dot(a_high, b_middle, rest))
        return acc + (apart(tl.dot(a_high, b_high, zeros)) + apart(rest))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def weighted_rows(x, w, DTYPE: tl.constexpr):
    """w[n] x[n] in DTYPE for a product over n, and what to multiply that by; x [rows, cols] and w
    fp32.

    w·x may leave fp16, as 1/z times x mostly does: there w is brought into [1/2, 1) by a power of
    two near its largest value in the tile.
    """
    if tl.float16 == DTYPE:
        down, up = power_to_fit(tl.max(tl.abs(w), 0))
        return (x * (w * (down * 0.000030517578125))[:, None]).to(DTYPE), up * 32768.0
    else:
        return (x * w[:, None]).to(DTYPE), 1.0


@triton.jit
def add_product(a, b, factor, acc):
    """acc + factor·(aᵀb) for 16-bit a, b; the factor is 1 but for fp16."""
    if a.dtype == tl.float16:
        return acc + tl.dot(tl.trans(a), b, tl.zeros(acc.shape, tl.float32)) * factor
    else:
        return tl.dot(tl.trans(a), b, acc)


@triton.jit
def in_columns(x, DTYPE: tl.constexpr):
    """A vector in fp32 as (16 columns in DTYPE whose rows add up to it, factor): a product with it
    sums as exactly as fp32 does, on the tensor cores.
    """
    if tl.float16 == DTYPE:
        down, up = power_to_fit(tl.max(tl.abs(x), 0))
        x = x * down
    else:
        up = 1.0
    high = x.to(DTYPE)
    rest = x - high.to(tl.float32)
    middle = rest.to(DTYPE)
    low = (rest - middle.to(tl.float32)).to(DTYPE)
    column = tl.arange(0, 16)[None, :]
    none = tl.zeros((1, 1), DTYPE)
    parts = tl.where(column == 2, low[:, None], none)
    parts = tl.where(column == 1, middle[:, None], parts)
    return tl.where(column == 0, high[:, None], parts), up


@triton.constexpr_function
def sums_in_columns(precision, decoupled):
    """Whether sums with a vector are products with `in_columns`: where the tile is in 16 bits."""
    return precision in ("native", "pair", "split") and not decoupled


@triton.jit
def whole_sums(
    state, sums, D: tl.constexpr, DN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DN: tl.constexpr, IN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """(state, sum of features) of a program, with 0 in columns beyond D, which hold what φ makes of
    0; the sums are the products with 16 columns, or one row for each row of a tile.
    """
    if D < BLOCK_D:
        state = tl.where((tl.arange(0, BLOCK_D) < D)[:, None], state, 0.0)
    key_sum = tl.sum(sums, 1 if IN_COLUMNS else 0)
    if DN < BLOCK_DN:
        key_sum = tl.where(tl.arange(0, BLOCK_DN) < DN, key_sum, 0.0)
    return state, key_sum


@triton.jit
def split_product(a, b, zeros):
    """a·b to fp32 accuracy as (high, low), for a in bf16 and b in fp32 as three bf16 parts, 24 bits
    in all.

    Tensor cores cut off what does not fit beside the largest summand. Products of `a` with the high
    part have 16 bits, which leaves room for their sum: it is nearly exact if nothing else shares
    its accumulator. The rest is 2^-8 of it.
    """
    high, middle, low = in_parts(b)
    return tl.dot(a, high, zeros), tl.dot(a, middle, tl.dot(a, low, zeros))


@triton.jit
def guarded(z, eps, NORMALIZER: tl.constexpr):
    """z + eps or max(z, eps); NaN stays NaN, as in torch.clamp."""
    if NORMALIZER == "add":
        return z + eps
    else:
        return tl.maximum(z, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def through_guard(grad, z, eps, NORMALIZER: tl.constexpr):
    """The gradient of z from that of guarded(z): none where the maximum is eps; where z is eps
    itself, what torch.clamp has.
    """
    if NORMALIZER == "clamp":
        if FLAT_AT_BOUND:
            return tl.where(z > eps, grad, 0.0)
        else:
            return tl.where(z >= eps, grad, 0.0)
    else:
        return grad
