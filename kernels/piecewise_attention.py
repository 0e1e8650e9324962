"""Piecewise sparse attention, the attention: formula in bla_inductor/ops/piecewise.py.

One program has TILE_Q queries of one block. It runs the online softmax over the keys of the
selected blocks, then over the means of all blocks with the selected masked, as if each block were
one key of logit s q·k̄ + ln len and value v̄; then it adds the first-order term. One running maximum
serves all three. All logits are in base 2.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _rescaled(x, top, bottom, far, acc):
    """The next logits x [TILE_Q, keys] as weights under the running maximum; what was summed
    before, brought to it.
    """
    larger = tl.maximum(top, tl.max(x, 1))
    p = tl.exp2(x - larger[:, None])
    down = tl.exp2(top - larger)
    return p, larger, bottom * down + tl.sum(p, 1), far * down, acc * down[:, None]


@triton.jit
def _table(moment, d, e, D: tl.constexpr, DV: tl.constexpr):
    """Rows d and columns e of H [D, DV]."""
    mask = (d < D)[:, None] & (e < DV)[None, :]
    return tl.load(moment + d[:, None] * DV + e[None, :], mask=mask, other=0.0)


@triton.jit
def attention_kernel(
    q, k, v, out, key_means, value_means, moment, factors, picks, chosen,
    queries, keys, programs, query_blocks, blocks, count, inner, scale,
    qs0, qs1, qsn, qsd, ks0, ks1, ksn, ksd, vs0, vs1, vsn, vsd, os0, os1, osn, osd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, TILE_Q: tl.constexpr, TILE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """EVEN: no key block is short."""
    h = (tl.program_id(0) // programs).to(tl.int64)
    start = tl.program_id(0) % programs * TILE_Q
    row = h * query_blocks + start // BLOCK
    picks += row * count
    chosen += row * blocks
    q += (h // inner) * qs0 + (h % inner) * qs1 + start.to(tl.int64) * qsn
    k += (h // inner) * ks0 + (h % inner) * ks1
    v += (h // inner) * vs0 + (h % inner) * vs1
    out += (h // inner) * os0 + (h % inner) * os1 + start.to(tl.int64) * osn
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    n = tl.arange(0, TILE_Q)
    m = tl.arange(0, TILE)
    inside_q = n < queries - start
    in_d, in_e = d < D, e < DV
    query = tl.load(
        q + n[:, None] * qsn + d[None, :] * qsd, mask=inside_q[:, None] & in_d[None, :], other=0.0
    )
    base2 = scale * 1.4426950408889634
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    bottom = tl.zeros([TILE_Q], tl.float32)
    far = tl.zeros([TILE_Q], tl.float32)  # the unselected part of `bottom`
    acc = tl.zeros([TILE_Q, BLOCK_V], tl.float32)

    parts: tl.constexpr = BLOCK // TILE
    k_tile = k + m[None, :] * ksn + d[:, None] * ksd
    v_tile = v + m[:, None] * vsn + e[None, :] * vsd
    for step in tl.range(0, count * parts):
        first = tl.load(picks + step // parts) * BLOCK + step % parts * TILE
        at_k, at_v = first.to(tl.int64) * ksn, first.to(tl.int64) * vsn
        if EVEN:
            key = tl.load(k_tile + at_k, mask=in_d[:, None], other=0.0)
            value = tl.load(v_tile + at_v, mask=in_e[None, :], other=0.0)
            x = tl.dot(query, key) * base2
        else:
            inside = first + m < keys
            key = tl.load(k_tile + at_k, mask=in_d[:, None] & inside[None, :], other=0.0)
            value = tl.load(v_tile + at_v, mask=inside[:, None] & in_e[None, :], other=0.0)
            x = tl.where(inside[None, :], tl.dot(query, key) * base2, float("-inf"))
        p, top, bottom, far, acc = _rescaled(x, top, bottom, far, acc)
        acc = tl.dot(p.to(value.dtype), value, acc)

    if count < blocks:
        key_means += h * blocks * D
        value_means += h * blocks * DV
        b = tl.arange(0, TILE)
        for step in tl.range(0, blocks, TILE):
            at = step + b
            known = at < blocks
            selected = tl.load(chosen + at, mask=known, other=1)
            key = tl.load(
                key_means + at[None, :] * D + d[:, None],
                mask=known[None, :] & in_d[:, None],
                other=0.0,
            )
            value = tl.load(
                value_means + at[:, None] * DV + e[None, :],
                mask=known[:, None] & in_e[None, :],
                other=0.0,
            )
            length = tl.maximum(tl.minimum(keys - at * BLOCK, BLOCK), 1)
            x = tl.dot(query, key) * base2 + tl.log2(length.to(tl.float32))[None, :]
            x = tl.where((selected == 0)[None, :], x, float("-inf"))
            p, top, bottom, far, acc = _rescaled(x, top, bottom, far, acc)
            far += tl.sum(p, 1)
            acc = tl.dot(p.to(value.dtype), value, acc)
        moment += h * (D * DV)
        if BLOCK_D <= 128:
            table = _table(moment, d, e, D, DV)
            first_order = tl.dot(query, table)
        else:  # all of H at once would fill the shared memory
            first_order = tl.zeros([TILE_Q, BLOCK_V], tl.float32)
            c = tl.arange(0, 64)
            for step in tl.range(0, BLOCK_D, 64):
                piece = tl.load(
                    q + n[:, None] * qsn + (step + c)[None, :] * qsd,
                    mask=inside_q[:, None] & (step + c < D)[None, :],
                    other=0.0,
                )
                table = _table(moment, step + c, e, D, DV)
                first_order = tl.dot(piece, table, first_order)
        factor = tl.load(factors + h * DV + e, mask=in_e, other=0.0)
        acc += first_order * factor[None, :] * (far * scale)[:, None]

    acc = acc / bottom[:, None]
    mask = inside_q[:, None] & in_e[None, :]
    tl.store(out + n[:, None] * osn + e[None, :] * osd, acc.to(out.dtype.element_ty), mask=mask)
