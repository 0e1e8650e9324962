"""The backward's launches: query pass, sum of the splits, key pass; or all in one for short
sequences; or in tiles of the head dims where one block a pass does not fit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from bla_inductor.kernels import heuristics, launching
from bla_inductor.kernels.batch import Batch, Gradients, aligned, reduced
from bla_inductor.kernels.key_pass import key_pass_kernel
from bla_inductor.kernels.launch_forward import add_splits, apply_state, statistics
from bla_inductor.kernels.launching import Map, Numbers, feature_map
from bla_inductor.kernels.mapping import has_rows, map_gradient, map_rows
from bla_inductor.kernels.precision import backward_precision
from bla_inductor.kernels.query_pass import query_pass_kernel
from bla_inductor.kernels.short import short_backward_kernel
from bla_inductor.kernels.wide import wide_query_kernel
from torch import Tensor


class Maps(NamedTuple):
    """The feature maps of a call."""

    q: Map
    k: Map
    q_norm: Map
    k_norm: Map


class Needs(NamedTuple):
    """Which sums over the queries the key side asks for."""

    dstate: bool
    dsum: bool


def backward(
    grads: Sequence[Tensor | None],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    maps: Sequence[str],
    normalizer: str,
    scale: float,
    norm_scale: float,
    eps: float,
    upcast: bool = False,
) -> None:
    """Write the gradients of q, k, v, q_norm, k_norm, key_weight that are not None (any strides,
    the inputs' shapes).

    maps: texts of the feature maps of q, k, q_norm, k_norm, "" for the identity.
    """
    numbers = Numbers(normalizer, scale, norm_scale, eps)
    precision = backward_precision(q.dtype, do.dtype, upcast=upcast)
    D, DV, DN = q.shape[-1], v.shape[-1], (q if q_norm is None else q_norm).shape[-1]
    wide = heuristics.wide_backward(D, DV, DN, precision, heuristics.capability(q.device))
    dq, dk, dv, dq_norm, dk_norm, dweight = grads
    with launching.on(q.device):
        do, q, k, v, q_norm, k_norm = map(aligned, (do, q, k, v, q_norm, k_norm))
        if wide and any(has_rows(text) for text in maps):
            _on_mapped_rows(
                grads, do, (q, k, v, q_norm, k_norm), key_weight, state, key_sum, maps,
                (normalizer, scale, norm_scale, eps, upcast),
            )  # fmt: skip
            return
        functions = Maps(*(feature_map(text, q.dtype) for text in maps))
        column = None if dweight is None else dweight.unsqueeze(-1)
        batch, key_batch = do.shape[:-2], state.shape[:-2]
        parts = 0
        if not wide and batch == key_batch and (dk, dv, dk_norm, dweight) != (None,) * 4:
            parts = heuristics.short_backward_parts(
                batch.numel(), q.shape[-2], k.shape[-2], D, DV, DN, q.element_size(), precision,
                heuristics.multiprocessors(q.device),
            )  # fmt: skip
        if parts and all(g is None or g.shape[:-2] == batch for g in (*grads[:5], column)):
            _short(
                (dq, dk, dv, dq_norm, dk_norm, column), do, q, k, v, q_norm, k_norm, key_weight,
                state, key_sum, functions, numbers, precision, parts,
            )  # fmt: skip
            return
        needs = Needs(
            dk is not None or dv is not None or dweight is not None,
            numbers.normalized
            and (dk_norm is not None or dweight is not None or (dk is not None and k_norm is None)),
        )
        gradients = Gradients(batch)
        query_pass = _query_pass_wide if wide else _query_pass
        dstate, dsum = query_pass(
            gradients.full(dq), gradients.full(dq_norm), do, q, q_norm, state, key_sum, numbers,
            precision, needs, (functions.q, functions.q_norm),
        )  # fmt: skip
        gradients.finish()
        if not any(needs):
            return
        gradients = Gradients(key_batch)
        key_pass = _key_pass_wide if wide else _key_pass
        key_pass(
            gradients.full(dk), gradients.full(dv), gradients.full(dk_norm),
            gradients.full(column), k, v, k_norm, key_weight, dstate,
            dsum if numbers.normalized else None, precision, (functions.k, functions.k_norm),
        )  # fmt: skip
        gradients.finish()


def _query_pass(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    numbers: Numbers,
    precision: str,
    needs: Needs,
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """Write dq, dq_norm; return dstate and dkey_sum with the state's batch (unwritten where not
    needed).

    Where the kernel cannot hold dstate beside the state, it leaves the sums to `statistics`.
    """
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    DN = (q if q_norm is None else q_norm).shape[-1]
    batch, key_batch = do.shape[:-2], state.shape[:-2]
    capability = heuristics.capability(q.device)
    fused = heuristics.fused_query_pass(D, DV, precision, capability)
    tile = heuristics.query_pass_tile(D, DV, DN, precision, capability)
    weights = None
    if any(needs) and not fused:
        weights = _token_weights(q, batch, numbers)
    operands = Batch(
        batch, (do, q, q_norm, state, key_sum if numbers.normalized else None), (dq, dq_norm)
    )
    rows, splits = heuristics.divide_rows(N, operands.count, tile, q.device)
    dstate = q.new_empty([*key_batch, D, DV], dtype=torch.float32)
    dsum = q.new_empty([*key_batch, DN] if numbers.normalized else [0], dtype=torch.float32)
    direct = weights is not None or (splits == 1 and key_batch == batch)
    out_state, out_sum, state_stride, sum_stride = dstate, dsum, D * DV, DN
    if not direct:
        state_stride = sum_stride = D * DV + (DN if numbers.normalized else 0)
        out_state = q.new_empty([*batch, splits, state_stride], dtype=torch.float32)
        out_sum = out_state[..., D * DV :] if numbers.normalized else dsum
    t, s = operands.tensors, operands.strides
    launching.run(
        query_pass_kernel,
        operands.count * splits,
        *(t[0], t[1], t[2], t[5], t[6], t[3], t[4]),
        out_state,
        out_sum,
        *(weights or (out_state, out_state)),
        N,
        rows,
        splits,
        operands.inner,
        *numbers.values,
        *s[0],
        *s[1],
        *s[2],
        *s[5],
        *s[6],
        *s[3][:2],
        *s[4][:2],
        state_stride,
        sum_stride,
        D=D,
        DV=DV,
        DN=DN,
        NORMALIZER=numbers.normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        NEED_DSTATE=needs.dstate and fused,
        NEED_DSUM=needs.dsum and fused,
        STORE_WEIGHTS=weights is not None,
        Q_MAP=maps[0].forward,
        Q_MAP_GRAD=maps[0].gradient,
        QN_MAP=maps[1].forward,
        QN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        BIG=operands.big(tile.BLOCK_N),
        FOLD=tile.FOLD,
        **launching.blocks(tile),
        tile=tile,
        pdl=True,
    )
    operands.finish()
    if weights is not None:
        return _weighted_statistics(q, do, q_norm, key_batch, numbers, precision, weights, maps)
    if not direct and any(needs):
        add_splits(reduced(out_state, key_batch), dstate, dsum, splits)
    return dstate, dsum


def _token_weights(q: Tensor, batch: Sequence[int], numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Buffers for w and dz of every query, the first filled where it is a constant."""
    weight = q.new_empty([*batch, q.shape[-2]], dtype=torch.float32)
    if not numbers.normalized:
        return weight.fill_(numbers.scale), weight
    return weight, torch.empty_like(weight)


def _weighted_statistics(
    q: Tensor,
    do: Tensor,
    q_norm: Tensor | None,
    key_batch: Sequence[int],
    numbers: Numbers,
    precision: str,
    weights: tuple[Tensor, Tensor],
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """dstate = Σ_n qf (w·do) and dkey_sum = Σ_n dz·qn, with the state's batch."""
    normalized = numbers.normalized
    dstate, dsum = statistics(q, do, q_norm, do.shape[:-2], normalized, precision, maps, weights)
    return reduced(dstate, key_batch), reduced(dsum, key_batch) if normalized else dsum


def _key_pass(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    dweight: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    dstate: Tensor,
    dsum: Tensor | None,
    precision: str,
    maps: tuple[Map, Map],
) -> None:
    """Write dk, dv, dk_norm, dweight."""
    M, D, DV = k.shape[-2], k.shape[-1], v.shape[-1]
    DN = D if dsum is None else dsum.shape[-1]
    tile = heuristics.key_pass_tile(D, DV, DN, precision, heuristics.capability(k.device))
    operands = Batch(
        dstate.shape[:-2],
        (k, v, k_norm, launching.weight_column(key_weight), dstate, dsum),
        (dk, dv, dk_norm, dweight),
    )
    rows, chunks = heuristics.divide_rows(M, operands.count, tile, k.device)
    t, s = operands.tensors, operands.strides
    launching.run(
        key_pass_kernel,
        operands.count * chunks,
        *t[:4],
        *t[6:],
        *t[4:6],
        M,
        rows,
        chunks,
        operands.inner,
        *s[0],
        *s[1],
        *s[2],
        *s[3][:3],
        *s[6],
        *s[7],
        *s[8],
        *s[9][:3],
        *s[4][:2],
        *s[5][:2],
        D=D,
        DV=DV,
        DN=DN,
        NORM="none" if dsum is None else "coupled" if k_norm is None else "decoupled",
        WEIGHT=launching.weight_kind(key_weight),
        NEED_DK=dk is not None,
        NEED_DV=dv is not None,
        NEED_DKN=dk_norm is not None,
        NEED_DW=dweight is not None,
        K_MAP=maps[0].forward,
        K_MAP_GRAD=maps[0].gradient,
        KN_MAP=maps[1].forward,
        KN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        BIG=operands.big(tile.BLOCK_N),
        **launching.blocks(tile),
        tile=tile,
        pdl=True,
    )
    operands.finish()


def _short(
    grads: Sequence[Tensor | None],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    maps: Maps,
    numbers: Numbers,
    precision: str,
    parts: int,
) -> None:
    N, M, D, DV = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    DN = (q if q_norm is None else q_norm).shape[-1]
    dq, dk, dv, dq_norm, dk_norm, dweight = grads
    tile = heuristics.short_tile(D, DV, DN, max(N, M))
    operands = Batch(
        do.shape[:-2],
        (
            do, q, k, v, q_norm, k_norm, launching.weight_column(key_weight), state,
            key_sum if numbers.normalized else None,
        ),
        (dq, dk, dv, dq_norm, dk_norm, dweight),
    )  # fmt: skip
    _, parts = heuristics.equal_parts(max(N, M), parts, tile)
    t, s = operands.tensors, operands.strides
    launching.run(
        short_backward_kernel,
        operands.count * parts,
        *t[:7],
        *t[9:],
        *t[7:9],
        N,
        M,
        heuristics.rows_of_part(N, parts, tile),
        heuristics.rows_of_part(M, parts, tile),
        parts,
        operands.inner,
        *numbers.values,
        *(stride for x in s[:6] for stride in x),
        *s[6][:3],
        *(stride for x in s[9:14] for stride in x),
        *s[14][:3],
        *s[7][:2],
        *s[8][:2],
        D=D,
        DV=DV,
        DN=DN,
        NORMALIZER=numbers.normalizer,
        NORM="none" if not numbers.normalized else "coupled" if k_norm is None else "decoupled",
        DECOUPLED=q_norm is not None,
        WEIGHT=launching.weight_kind(key_weight),
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        NEED_DK=dk is not None,
        NEED_DV=dv is not None,
        NEED_DKN=dk_norm is not None,
        NEED_DW=dweight is not None,
        Q_MAP=maps.q.forward,
        Q_MAP_GRAD=maps.q.gradient,
        K_MAP=maps.k.forward,
        K_MAP_GRAD=maps.k.gradient,
        QN_MAP=maps.q_norm.forward,
        QN_MAP_GRAD=maps.q_norm.gradient,
        KN_MAP=maps.k_norm.forward,
        KN_MAP_GRAD=maps.k_norm.gradient,
        PRECISION=precision,
        BIG=operands.big(tile.BLOCK_N),
        FOLD=tile.FOLD,
        **launching.blocks(tile),
        tile=tile,
    )
    operands.finish()


def _query_pass_wide(
    dq: Tensor | None,
    dq_norm: Tensor | None,
    do: Tensor,
    q: Tensor,
    q_norm: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    numbers: Numbers,
    precision: str,
    needs: Needs,
    maps: tuple[Map, Map],
) -> tuple[Tensor, Tensor]:
    """As `_query_pass`, in two kernels."""
    N, D, DV = q.shape[-2], q.shape[-1], do.shape[-1]
    DN = (q if q_norm is None else q_norm).shape[-1]
    batch = do.shape[:-2]
    tile = heuristics.wide_query_tile(precision)
    operands = Batch(
        batch, (do, q, q_norm, state, key_sum if numbers.normalized else None), (dq, dq_norm)
    )
    weights = _token_weights(q, batch, numbers)
    blocks = -(-N // tile.BLOCK_N)
    t, s = operands.tensors, operands.strides
    launching.run(
        wide_query_kernel,
        operands.count * blocks,
        *(t[0], t[1], t[2], t[5], t[6], t[3], t[4]),
        *weights,
        N,
        blocks,
        operands.inner,
        *numbers.values,
        *s[0],
        *s[1],
        *s[2],
        *s[5],
        *s[6],
        *s[3][:2],
        *s[4][:2],
        D=D,
        DV=DV,
        DN=DN,
        BLOCK_C=tile.BLOCK_D,
        BLOCK_V=tile.BLOCK_V,
        BLOCK_N=tile.BLOCK_N,
        NORMALIZER=numbers.normalizer,
        DECOUPLED=q_norm is not None,
        NEED_DQ=dq is not None,
        NEED_DQN=dq_norm is not None,
        Q_MAP=maps[0].forward,
        Q_MAP_GRAD=maps[0].gradient,
        QN_MAP=maps[1].forward,
        QN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        BIG=operands.big(tile.BLOCK_N),
        tile=tile,
        pdl=True,
    )
    operands.finish()
    if not any(needs):
        return weights
    return _weighted_statistics(q, do, q_norm, state.shape[:-2], numbers, precision, weights, maps)


def _key_pass_wide(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    dweight: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    dstate: Tensor,
    dsum: Tensor | None,
    precision: str,
    maps: tuple[Map, Map],
) -> None:
    """As `_key_pass`, with the output kernel."""
    plain = Numbers("none", 1.0, 1.0, 0.0)
    identity = (Map(), Map())
    batch = dstate.shape[:-2]
    if dk is None and dweight is not None:
        dk = k.new_empty([*batch, *k.shape[-2:]])
    if dk is not None:
        apply_state(
            dk, v, None, dstate.mT, None, dsum if k_norm is None else None, plain, precision,
            identity, key_weight, k, maps[0], dweight,
        )  # fmt: skip
    if dv is not None:
        apply_state(dv, k, None, dstate, None, None, plain, precision, (maps[0], Map()), key_weight)
    if dsum is None or k_norm is None:
        return
    rows = dsum.unsqueeze(-2)
    if dweight is not None:
        dweight += (map_rows(k_norm, maps[1]).float() * rows).sum(-1, keepdim=True)
    if dk_norm is not None:
        if key_weight is not None:
            rows = rows * key_weight.unsqueeze(-1)
        g = rows.expand(dk_norm.shape)
        dk_norm.copy_(map_gradient(k_norm.expand(dk_norm.shape), g, maps[1]))


def _on_mapped_rows(
    grads: Sequence[Tensor | None],
    do: Tensor,
    inputs: Sequence[Tensor | None],
    key_weight: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    maps: Sequence[str],
    numbers: tuple[str, float, float, float, bool],
) -> None:
    """Row-wise maps need whole rows, which passes in tiles do not have: φ(q), φ(k) are made before
    the backward of the rest, and their gradients turned into those of q, k afterwards.
    """
    texts, made, wanted = list(maps), list(inputs), list(grads)
    places = {0: 0, 1: 1, 3: 2, 4: 3}  # input: its map
    mapped = [i for i, j in places.items() if inputs[i] is not None and has_rows(maps[j])]
    for i in mapped:
        x = inputs[i]
        assert x is not None
        made[i] = map_rows(x, feature_map(maps[places[i]], x.dtype))
        texts[places[i]] = ""
        if wanted[i] is not None:
            wanted[i] = x.new_empty(x.shape, dtype=torch.float32)
    for j in set(range(4)) - {places[i] for i in mapped}:
        texts[j] = "" if has_rows(texts[j]) else texts[j]
    q, k, v, q_norm, k_norm = made
    assert q is not None
    assert k is not None
    assert v is not None
    backward(wanted, do, q, k, v, q_norm, k_norm, key_weight, state, key_sum, texts, *numbers)
    for i in mapped:
        x, g, target = inputs[i], wanted[i], grads[i]
        if x is not None and g is not None and target is not None:
            target.copy_(map_gradient(x, g, feature_map(maps[places[i]], x.dtype)))
