"""The backward as templates: query pass, sum of the splits, key pass; or all in one for short
sequences.

The counterpart of `bla_inductor.kernels.backward`, whose tables of arguments it follows. Gradients
of what was broadcast leave in fp32 with the pass's whole batch, and Inductor sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch._inductor import ir
from torch._inductor import lowering as inductor

from bla_inductor.kernels import heuristics, short_heuristics
from bla_inductor.kernels.large import whole_query_pass
from bla_inductor.kernels.precision import backward_precision
from bla_inductor.ops.feature_map import has_rows
from bla_inductor.ops.layout import dense_strides
from bla_inductor.ops.packed import split_places
from bla_inductor.ops.schema import Gradients
from bla_inductor.templates import Unsupported, arguments
from bla_inductor.templates.arguments import empty
from bla_inductor.templates.forward import Call, bound
from bla_inductor.templates.key_pass import key_pass, short_backward
from bla_inductor.templates.operands import Expr, Node, equal, merges, realized
from bla_inductor.templates.query_pass import query_pass
from bla_inductor.templates.tiles import dense, in_tiles, over_batch
from bla_inductor.templates.wanted import NAMES, Wanted
from bla_inductor.templates.wide_key_pass import key_pass_wide

Packed: TypeAlias = tuple[Sequence[Expr], Sequence[int]]


def backward(x: Gradients, packed: Packed | None = None) -> tuple[Node, ...]:
    """The gradients, as `bla::linear_attention_backward` returns them, for an `x` of nodes.

    packed: (size, places) of a buffer for some of them, which is then the first result.
    """
    call = bound(x.inputs)
    read = {"q": x.inputs.q, "q_norm": x.inputs.q_norm, "do": in_tiles("do", x.do)}
    read = over_batch(call.query_batch, read, call.key_batch)
    x.inputs.q, x.inputs.q_norm, do = read["q"], read["q_norm"], read["do"]
    assert do is not None
    state = dense(x.state)
    key_sum = dense(x.key_sum) if x.inputs.normalized else None
    widest = max(call.D, call.DV, call.DN)
    precision = backward_precision(call.dtype, do.get_dtype(), widest, upcast=x.inputs.upcast)
    capability = heuristics.capability(call.device)
    sizes = call.D, call.DV, call.DN
    wide = heuristics.wide_backward(*sizes, precision, capability)
    if wide and not _whole(call, sizes, precision, capability):
        raise Unsupported(f"head dims {call.D}, {call.DV} in {precision}: a backward in tiles")
    key_side = any(x.needs[i] for i in (1, 2, 4, 5))
    parts = _short_parts(call, x, do, precision) if key_side and not wide else 0
    joined, places = None, {}
    if packed is not None:
        joined = empty(packed[0], call.dtype, call.device)
        places = split_places(packed[1], len(call.query_batch) + 2)
    wanted = Wanted()
    summed = {}
    for i, name in enumerate(NAMES):
        if not x.needs[i] or x.inputs.tensors[i] is None:
            continue
        batch, beside = call.key_batch, [*x.inputs.tensors[1:3], *x.inputs.tensors[4:]]
        if name in ("DQ", "DQN"):
            batch, beside = call.query_batch, [do, x.inputs.q, x.inputs.q_norm]
        if i in places:
            result, buffer = None, _placed(x, call, i, batch, joined, places[i])
        else:
            result, buffer = _gradient(x, call, i, batch, beside)
        wanted.results[i] = result
        wanted.written[name] = (buffer, 1 if name == "DA" else 2)
        if result is None and i not in places:
            summed[i] = buffer
    if parts:
        short_backward(call, wanted, do, state, key_sum, precision, parts)
    else:
        dstate, dsum = query_pass(call, wanted, do, state, key_sum, precision)
        if key_side:
            over_keys = key_pass_wide if wide else key_pass
            over_keys(call, wanted, dstate, dsum, precision)
    for i, buffer in summed.items():
        wanted.results[i] = _summed(x, i, buffer)
    nothing = empty([0], call.dtype, call.device)
    results = (nothing if result is None else result for result in wanted.results)
    return (*results,) if joined is None else (joined, *results)


def _whole(call: Call, sizes: tuple[int, int, int], precision: str, capability: int) -> bool:
    """Whether templates cover a head dim above 128."""
    x = call.x
    if x.q_norm is not None or x.k_norm is not None or any(map(has_rows, call.maps.values())):
        return False
    if arguments.weight_kind(x.key_weight) == "float":  # whose gradient sums over tiles
        return False
    return whole_query_pass(*sizes, call.dtype, precision, capability)


def _placed(
    x: Any, call: Call, i: int, batch: Sequence[Expr], joined: Node, place: tuple[int, list[int]]
) -> Node:
    """The part of the joined buffer that is the i-th gradient."""
    sizes = x.inputs.tensors[i].get_size()
    if not all(map(equal, sizes[:-2], batch)):
        raise Unsupported("a gradient that is summed over the batch cannot be written in place")
    offset, strides = place
    layout = ir.FixedLayout(call.device, call.dtype, list(sizes), strides, offset)
    return ir.ReinterpretView(data=realized(joined).data, layout=layout)


def _gradient(
    x: Any, call: Call, i: int, batch: Sequence[Expr], beside: Sequence[Node | None]
) -> tuple[Node | None, Node]:
    """(the result or None, the buffer for the kernel): the same where nothing was broadcast.

    beside: what the kernel reads. Contiguous where the wanted order does not merge with that.
    """
    t = x.inputs.tensors[i]
    assert t is not None
    sizes, own = t.get_size(), 1 if i == 5 else 2
    if all(map(equal, sizes[:-own], batch)):
        order = list(_order(x, i) or range(len(sizes)))
        strides = dense_strides(sizes, order)
        # The queries' pass has dense states beside it, of the keys' batch.
        states = call.key_batch, ir.FlexibleLayout.contiguous_strides(call.key_batch)
        if not merges(batch, beside, [(sizes, strides), states]):
            strides = ir.FlexibleLayout.contiguous_strides(sizes)
        result = inductor.empty_strided(
            list(sizes), strides, dtype=t.get_dtype(), device=call.device
        )
        return result, result
    return None, empty([*batch, *sizes[-own:]], torch.float32, call.device)


def _order(x: Any, i: int) -> Sequence[int] | None:
    """As `Gradients.order`, for nodes."""
    rank = len(x.inputs.q.get_size())
    return x.orders[i * rank : (i + 1) * rank] if x.orders and i < 5 else None


def _summed(x: Any, i: int, buffer: Node) -> Node:
    """The gradient of what was broadcast, in its dtype."""
    t = x.inputs.tensors[i]
    assert t is not None
    sizes = t.get_size()
    dims = [d for d, size in enumerate(buffer.get_size()) if not equal(size, sizes[d])]
    total = inductor.lowerings[torch.ops.aten.sum.dim_IntList](buffer, dims, keepdims=True)
    return inductor.to_dtype(total, t.get_dtype())


def _short_parts(call: Call, x: Any, do: Node, precision: str) -> int:
    """Programs a head of the kernel for short sequences; 0: not that one. A symbolic length may
    turn out long.
    """
    if not arguments.is_static(call.N, call.M):
        return 0
    given = [t for t, need in zip(x.inputs.tensors, x.needs, strict=True) if need and t is not None]
    batches = [t.get_size()[: len(call.query_batch)] for t in given]
    if not all(all(map(equal, b, call.query_batch)) for b in [*batches, call.key_batch]):
        return 0
    if not merges(call.query_batch, [do, *x.inputs.tensors]):
        return 0
    return short_heuristics.short_backward_parts(
        arguments.hint(arguments.product(call.query_batch)),
        int(call.N),
        int(call.M),
        call.D,
        call.DV,
        call.DN,
        call.dtype.itemsize,
        precision,
        heuristics.multiprocessors(call.device),
        heuristics.capability(call.device),
    )
