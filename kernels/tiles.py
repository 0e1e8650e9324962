"""How a tile of rows by columns gets from memory into a program: by pointers, or by descriptors.

With pointers every thread asks for 16 bytes at a time, and of a row of 80 features padded to 128
six threads of sixteen ask for nothing: as much work as for a whole row. With descriptors (TMA,
sm_90) one thread asks for the tile, hardware moves it, and what lies outside is zero. A descriptor
takes 128 bytes of memory a program (`compat.gives_kernels_memory`), and about a microsecond to
make, so large tensors have them (large.py) and small ones have pointers.

Rows are 16-byte aligned and features contiguous either way (batch.py).
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def tiles_of(
    pointer, rows, sn, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """What `load_tile` reads: `rows` rows of COLUMNS columns from `pointer` on."""
    if TMA:
        rows = rows.to(tl.int32)
        return tl.make_tensor_descriptor(pointer, [rows, COLUMNS], [sn, 1], [BLOCK_N, BLOCK])
    else:
        return pointer


@triton.jit
def load_tile(tiles, row, column, rn, cols, sn, sd, mask, TMA: tl.constexpr):
    """A tile, 0 outside. TMA: from `row` and `column` on, all that exists of it; else `rn` by
    `cols` from the pointer on, where `mask` is true.
    """
    if TMA:
        return tiles.load([tl.cast(row, tl.int32), tl.cast(column, tl.int32)])
    else:
        return tl.load(tiles + rn[:, None] * sn + cols[None, :] * sd, mask=mask, other=0.0)
