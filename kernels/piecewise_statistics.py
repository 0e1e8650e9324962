"""Piecewise sparse attention, before the attention: block means, the moment of the keys, selection.

    means      q̄ (query blocks, D), fp32
    statistics k̄ (fp32, and in the inputs' dtype), v̄ = v̂/len, and partial sums of kᵀv - len k̄ᵀv̄
    combine    the partial sums added in fixed order, over T, as 16-bit columns with a factor each
    select     of each query block's scores q̄·k̄, the COUNT largest: a mask, and their places

Head h is (h // inner, h % inner) in the two batch dims of q, k and v. Products of 16-bit numbers
are exact in fp32, so that Σ kᵀv - len k̄ᵀv̄ loses less than centred keys rounded to 16 bit would.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def means_kernel(
    x, means, rows, blocks, inner, xs0, xs1, xsn, xsd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """means[h, block] = the mean of the block's rows of x [*, rows, D]."""
    h, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK)
    length = tl.minimum(rows - block * BLOCK, BLOCK)
    x += (h // inner).to(tl.int64) * xs0 + (h % inner).to(tl.int64) * xs1
    x += (block * BLOCK).to(tl.int64) * xsn
    mask = (n < length)[:, None] & (d < D)[None, :]
    tile = tl.load(x + n[:, None] * xsn + d[None, :] * xsd, mask=mask, other=0.0)
    mean = tl.sum(tile.to(tl.float32), 0) / length
    tl.store(means + tl.program_id(0).to(tl.int64) * D + d, mean, mask=d < D)


@triton.jit
def statistics_kernel(
    k, v, key_means, keys_low, value_means, partial, rows, blocks, splits, each, inner,
    ks0, ks1, ksn, ksd, vs0, vs1, vsn, vsd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The program's `each` blocks of one head, and of BLOCK_V value channels."""
    tiles: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    h = tl.program_id(0) // tiles // splits
    d = tl.arange(0, BLOCK_D)
    e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    n = tl.arange(0, TILE)
    k += (h // inner).to(tl.int64) * ks0 + (h % inner).to(tl.int64) * ks1
    v += (h // inner).to(tl.int64) * vs0 + (h % inner).to(tl.int64) * vs1
    moment = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    first = split * each
    for block in tl.range(first, tl.minimum(first + each, blocks)):
        length = tl.minimum(rows - block * BLOCK, BLOCK)
        k_sum = tl.zeros([BLOCK_D], tl.float32)
        v_sum = tl.zeros([BLOCK_V], tl.float32)
        for part in tl.static_range(BLOCK // TILE):
            inside = part * TILE + n < length
            start = tl.cast(block * BLOCK + part * TILE, tl.int64)
            k_tile = tl.load(
                k + start * ksn + n[:, None] * ksn + d[None, :] * ksd,
                mask=inside[:, None] & (d < D)[None, :],
                other=0.0,
            )
            v_tile = tl.load(
                v + start * vsn + n[:, None] * vsn + e[None, :] * vsd,
                mask=inside[:, None] & (e < DV)[None, :],
                other=0.0,
            )
            k_sum += tl.sum(k_tile.to(tl.float32), 0)
            v_sum += tl.sum(v_tile.to(tl.float32), 0)
            moment = tl.dot(tl.trans(k_tile), v_tile, moment)
        k_mean, v_mean = k_sum / length, v_sum / length
        moment -= k_mean[:, None] * v_sum[None, :]
        at = h.to(tl.int64) * blocks + block
        tl.store(value_means + at * DV + e, v_mean.to(v.dtype.element_ty), mask=e < DV)
        if tile == 0:
            tl.store(key_means + at * D + d, k_mean, mask=d < D)
            tl.store(keys_low + at * D + d, k_mean.to(k.dtype.element_ty), mask=d < D)
    partial += (h.to(tl.int64) * splits + split) * (D * DV)
    mask = (d < D)[:, None] & (e < DV)[None, :]
    tl.store(partial + d[:, None] * DV + e[None, :], moment, mask=mask)


@triton.jit
def combine_kernel(
    partial, moment, factors, splits, rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """moment[:, e] · factors[e] = Σ partial[:, e] / rows, every column at most one in size.

    A moment in fp16 might overflow, or vanish.
    """
    tiles: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    h = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (d < D)[:, None] & (e < DV)[None, :]
    at = d[:, None] * DV + e[None, :]
    total = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    partial += h * splits * (D * DV)
    for split in tl.range(0, splits, num_stages=4):
        total += tl.load(partial + tl.cast(split, tl.int64) * (D * DV) + at, mask=mask, other=0.0)
    total = total / rows
    factor = tl.max(tl.abs(total), 0)
    column = total / tl.where(factor > 0, factor, 1.0)[None, :]
    column = column.to(moment.dtype.element_ty)
    tl.store(moment + h * (D * DV) + at, column, mask=mask)
    tl.store(factors + h * DV + e, factor, mask=e < DV)


@triton.jit
def select_kernel(scores, chosen, picks, blocks, count, WIDTH: tl.constexpr):
    """One query block: chosen [blocks] is one at the `count` largest of scores [blocks], picks
    [count] are their places, ascending. Of equal scores the earlier ones are taken.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < blocks
    # Adding zero makes -0.0 the 0.0 that it equals.
    score = tl.load(scores + row * blocks + j, mask=inside, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    # Bits that compare as the numbers do: the sign flipped, negative numbers the other way round.
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # The count-th largest rank, from its sign down: the largest bound that `count` ranks reach.
    enough = tl.sum((inside & (rank >= 0)).to(tl.int32), 0) >= count
    bound = tl.where(enough, 0, -2147483648).to(tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        candidate = bound + bit
        bit = bit >> 1
        reached = tl.sum((inside & (rank >= candidate)).to(tl.int32), 0)
        bound = tl.where(reached >= count, candidate, bound)
    above = inside & (rank > bound)
    equal = inside & (rank == bound)
    room = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + row * blocks + j, taken.to(tl.uint8), mask=inside)
    tl.store(picks + row * count + place, j, mask=taken)
