"""What the kernels share: tiles with masks, matrix products at a stated precision, the guard of the normaliser."""

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
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in fp32.

    native: b rounded to a's 16-bit type.   split3: b in three parts of a's type, 24 bits in all (bf16).
    tf32, tf32x3: both as fp32, through one or three tf32 products. fp16 is a subset of tf32 (11 significant bits)
    with fp32's range, so fp16 operands lose nothing and fp32 ones cannot overflow.
    """
    if PRECISION == "native":
        return tl.dot(a, b.to(a.dtype), acc)
    elif PRECISION == "split3":
        high = b.to(a.dtype)
        rest = b - high.to(tl.float32)
        middle = rest.to(a.dtype)
        low = (rest - middle.to(tl.float32)).to(a.dtype)
        # The small parts first, so that they are not lost against the sum of the large ones.
        acc = tl.dot(a, low, acc)
        acc = tl.dot(a, middle, acc)
        return tl.dot(a, high, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def guarded(z, eps, NORMALIZER: tl.constexpr):
    """z + eps or max(z, eps); NaN stays NaN, as in torch.clamp."""
    if NORMALIZER == "add":
        return z + eps
    else:
        return tl.maximum(z, eps, propagate_nan=tl.PropagateNan.ALL)
