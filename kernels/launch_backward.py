"""The backward's launches: query pass, sum of the splits, key pass; or all in one for short
sequences; or in tiles of the head dims where one block a pass does not fit.
"""

from collections.abc import Sequence

import torch
from bla_inductor.kernels import heuristics, launching, short_heuristics
from bla_inductor.kernels.batch import Gradients, aligned
from bla_inductor.kernels.large import whole_query_pass
from bla_inductor.kernels.launch_key_pass import key_pass, key_pass_wide
from bla_inductor.kernels.launch_query_pass import Needs, query_pass, query_pass_wide
from bla_inductor.kernels.launch_short import short_backward
from bla_inductor.kernels.launching import Numbers, feature_map, feature_maps
from bla_inductor.kernels.mapping import map_gradient, map_rows
from bla_inductor.kernels.precision import backward_precision
from torch import Tensor

from bla_inductor.ops.feature_map import has_rows


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
    D, DV, DN = q.shape[-1], v.shape[-1], (q if q_norm is None else q_norm).shape[-1]
    precision = backward_precision(q.dtype, do.dtype, max(D, DV, DN), upcast=upcast)
    capability = heuristics.capability(q.device)
    wide = heuristics.wide_backward(D, DV, DN, precision, capability)
    whole = not wide or (
        q_norm is None and whole_query_pass(D, DV, DN, q.dtype, precision, capability)
    )
    dq, dk, dv, dq_norm, dk_norm, dweight = grads
    with launching.on(q.device):
        do, q, k, v, q_norm, k_norm = map(aligned, (do, q, k, v, q_norm, k_norm))
        state, key_sum = state.contiguous(), key_sum.contiguous()  # a graph may keep them otherwise
        if wide and any(has_rows(text) for text in maps):
            _on_mapped_rows(
                grads, do, (q, k, v, q_norm, k_norm), key_weight, state, key_sum, maps,
                (normalizer, scale, norm_scale, eps, upcast),
            )  # fmt: skip
            return
        functions = feature_maps(maps, q.dtype)
        column = None if dweight is None else dweight.unsqueeze(-1)
        batch, key_batch = do.shape[:-2], state.shape[:-2]
        parts = 0
        if not wide and batch == key_batch and (dk, dv, dk_norm, dweight) != (None,) * 4:
            parts = short_heuristics.short_backward_parts(
                batch.numel(), q.shape[-2], k.shape[-2], D, DV, DN, q.element_size(), precision,
                heuristics.multiprocessors(q.device), capability,
            )  # fmt: skip
        if parts and all(g is None or g.shape[:-2] == batch for g in (*grads[:5], column)):
            short_backward(
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
        over_queries = query_pass if whole else query_pass_wide
        dstate, dsum = over_queries(
            gradients.full(dq), gradients.full(dq_norm), do, q, q_norm, state, key_sum, numbers,
            precision, needs, (functions.q, functions.q_norm),
        )  # fmt: skip
        gradients.finish()
        if not any(needs):
            return
        gradients = Gradients(key_batch)
        over_keys = key_pass_wide if wide else key_pass
        over_keys(
            gradients.full(dk), gradients.full(dv), gradients.full(dk_norm),
            gradients.full(column), k, v, k_norm, key_weight, dstate,
            dsum if numbers.normalized else None, precision, (functions.k, functions.k_norm),
        )  # fmt: skip
        gradients.finish()


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
