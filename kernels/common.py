"""What the kernels share: tiles with masks, matrix products at a stated precision, the guard of the
normaliser.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def tile_range(SIZE: tl.constexpr, BIG: tl.constexpr):
    """0 … SIZE-1; in int64 with BIG, for tensors whose offsets within one tile leave int32."""
    r = tl.arange(0, SIZE)
    if BIG:
        r = r.to(tl.int64)
    return r


@triton.jit
def tile_mask(rows, N, cols, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, cols] inside N × D; without the test of the columns where D fills its block."""
    if D == BLOCK_D:
        return (rows < N)[:, None]
    else:
        return (rows < N)[:, None] & (cols < D)[None, :]


@triton.jit
def round_tf32(x):
    """x in fp32, rounded to the nearest value of 11 significant bits: tensor cores would cut off
    the rest instead.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in fp32.

    native: b rounded to a's 16-bit type.   tf32: both rounded to tf32. fp16 is a subset of tf32
    with fp32's range, so fp16 operands lose nothing and fp32 ones cannot overflow.   ieee: fp32 on
    the CUDA cores.   tf32x2: b as two tf32 parts beside a 16-bit a, three products beside an fp32
    a.
    """
    if PRECISION == "native":
        return tl.dot(a, b.to(a.dtype), acc)
    elif PRECISION == "tf32":
        a = a.to(tl.float32) if a.dtype != tl.float32 else round_tf32(a)
        b = b.to(tl.float32) if b.dtype != tl.float32 else round_tf32(b)
        return tl.dot(a, b, acc, input_precision="tf32")
    elif PRECISION == "tf32x2":
        if a.dtype == tl.float32:
            return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32x3")
        a = a.to(tl.float32)
        high = round_tf32(b.to(tl.float32))
        low = b.to(tl.float32) - high
        return tl.dot(a, high, tl.dot(a, low, acc, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def split_product(a, b, zeros):
    """a·b to fp32 accuracy as (high, low), for a in bf16 and b in fp32 as three bf16 parts, 24 bits
    in all.

    Tensor cores cut off what does not fit beside the largest summand. Products of `a` with the high
    part have 16 bits, which leaves room for their sum: it is nearly exact if nothing else shares
    its accumulator. The rest is 2^-8 of it.
    """
    high = b.to(tl.bfloat16)
    rest = b - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(a, high, zeros), tl.dot(a, middle, tl.dot(a, low, zeros))


@triton.jit
def guarded(z, eps, NORMALIZER: tl.constexpr):
    """z + eps or max(z, eps); NaN stays NaN, as in torch.clamp."""
    if NORMALIZER == "add":
        return z + eps
    else:
        return tl.maximum(z, eps, propagate_nan=tl.PropagateNan.ALL)
