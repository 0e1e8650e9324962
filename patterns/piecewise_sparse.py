"""Softmax attention, which piecewise sparse attention approximates.

    out[b,n,d] = g · Σ_m softmax_m( s · Σ_c q[b,n,c] · k[b,m,c] ) · v[b,m,d]

PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers, arXiv 2602.01077.

Two products with a softmax between them, whatever order, layout or operator they are written in:
the softmax is a leaf whose origin is a Term; both Terms are read in common indices. The softmax
runs over exactly the indices that the second product sums, which tells keys from queries.
`F.scaled_dot_product_attention` is the same in one operator.

An index of the queries that neither keys nor values have (the heads of one-headed keys, say) counts
as part of the queries. Not handled, each a Mismatch: a mask or a bias on the scores, causality,
dropout, anything else that stands between the products, a softmax that is written out as exp and a
sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from bla_inductor.patterns.contraction import Contraction, Known, Roles
from bla_inductor.patterns.linear_attention import Mismatch
from torch import fx

from bla_inductor.algebra import (
    Axes,
    Factor,
    Index,
    Inexpressible,
    Leaf,
    Observation,
    Read,
    Term,
    Value,
    equal,
    refine,
)
from bla_inductor.algebra.index import as_size

__all__ = ["SoftmaxAttention", "match"]

aten = torch.ops.aten
SCORES = Contraction("q: n c, k: m c -> n m")
READOUT = Contraction("p: n m, v: m d -> n d")
_SOFTMAX = (aten._softmax, aten._safe_softmax)
# What is done to scores between the product and the softmax, entry by entry.
_CHANGES = (
    aten.add,
    aten.sub,
    aten.mul,
    aten.div,
    aten.where,
    aten.masked_fill,
    aten.tanh,
    aten.clamp,
    aten.clamp_min,
    aten.clamp_max,
)
_CALLS = (
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MOST_STEPS = 5


@dataclass(frozen=True, slots=True)
class SoftmaxAttention:
    """The factors of each operand and the indices of each letter; axes: those of the result.

    scale: s, None for 1/√D; gain: g; softmax: what makes one attention one, however many nodes tell
    it.
    """

    scale: float | sympy.Expr | None
    gain: float | sympy.Expr
    q: tuple[Factor, ...]
    k: tuple[Factor, ...]
    v: tuple[Factor, ...]
    batch: tuple[Index, ...]
    n: tuple[Index, ...]
    m: tuple[Index, ...]
    c: tuple[Index, ...]
    d: tuple[Index, ...]
    axes: Axes
    softmax: object


def match(node: fx.Node, seen: Observation, known: Known) -> SoftmaxAttention | Mismatch | None:
    """`node` as softmax attention; None where it does not resemble it.

    known: whether a product of factors is a tensor of the graph.
    """
    if node.target in _CALLS:
        return _call(node, seen)
    value = seen.values.get(node)
    if value is None or not value.term.bound:
        return None
    for read in value.term.factors:
        if not isinstance(read, Read) or not read.indices() & set(value.term.bound):
            continue
        softmax = _softmax_below(read.leaf)
        if softmax is None or read.power != 1:
            continue
        if softmax is not read.leaf:
            return Mismatch(
                f"`{read.leaf.operation}` stands between the softmax and the values; apply it to "
                "the result, or call model.eval() if it is a dropout"
            )
        return _product(value, read, known)
    return None


def _call(node: fx.Node, seen: Observation) -> SoftmaxAttention | Mismatch:
    """One call of scaled_dot_product_attention."""
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    if given.get("attn_mask") is not None:
        return Mismatch(
            "it has an attention mask, which block means cannot carry; leave attn_mask out if it "
            "masks nothing"
        )
    if given.get("dropout_p", 0.0) not in (0, 0.0):
        return Mismatch("it has dropout, whose entries are random; call model.eval()")
    if given.get("is_causal", False) is not False:
        return Mismatch("it is causal: a block of keys is not the same for all of its queries")
    if given.get("enable_gqa", False) is not False:
        return Mismatch("its heads are grouped (enable_gqa); repeat the heads of k and v before it")
    operands = [given[name] for name in _NAMES[:3]]
    tensors = [seen.tensors[x] for x in operands]
    q, k, v = ([as_size(s) for s in t.shape] for t in tensors)
    if len({len(q), len(k), len(v)}) != 1:
        return Mismatch("q, k and v have different numbers of dims; give them batch dims of size 1")
    result = seen.tensors[node]
    sizes = [as_size(s) for s in result.shape]
    batch = [Index(s) for s in sizes[:-2]]
    n, m, c, d = (Index(s) for s in (q[-2], k[-2], k[-1], v[-1]))
    letters = ((n, c), (m, c), (m, d))
    reads = []
    for x, tensor, shape, last in zip(operands, tensors, (q, k, v), letters, strict=True):
        leaf = Leaf(tuple(shape), tensor.dtype, False, "operand", x, seen.position[node])
        outer = ((i,) if equal(s, i.size) else () for i, s in zip(batch, shape[:-2], strict=True))
        # Under autocast the operator casts its operands to the dtype of its result.
        narrow = min(tensor.dtype, result.dtype, key=lambda t: t.itemsize)
        reads.append(Read(leaf, (*outer, *((i,) for i in last)), narrow))
    q_factors, k_factors, v_factors = ((read,) for read in reads)
    scale = given.get("scale")
    return SoftmaxAttention(
        None if scale is None else float(scale),
        1.0,
        q_factors,
        k_factors,
        v_factors,
        tuple(batch),
        (n,),
        (m,),
        (c,),
        (d,),
        (*((i,) for i in batch), (n,), (d,)),
        node,
    )


def _product(value: Value, read: Read, known: Known) -> SoftmaxAttention | Mismatch | None:
    """Σ_m softmax · v, where `read` is the softmax."""
    assert read.leaf.origin is not None
    scores, dim = read.leaf.origin.args[:2]
    if not isinstance(scores, Value) or not _is_product(scores):
        changed = isinstance(scores, Value) and next(_products_below(scores), None)
        return changed or None
    try:
        value, read, scores = _in_common_indices(value, read, scores.fresh())
    except Inexpressible:
        return Mismatch("its scores are reshaped across the axes of the softmax")
    over = set(read.axes[dim % len(read.axes)])
    if over != set(value.term.bound):
        return Mismatch("the softmax does not run over just the axis that the values are summed on")
    readout = _readout(value.term, read, known)
    if readout is None:
        return Mismatch("the product of the softmax and the values has further factors")
    inner = _scores(scores, over, known)
    if inner is None:
        return Mismatch("the scores are no product of one q and one k, scaled by a number")
    v, d = readout.operands["v"], readout.letters["d"]
    q, k = inner.operands["q"], inner.operands["k"]
    c, m = inner.letters["c"], inner.letters["m"]
    shared = frozenset().union(*(f.indices() for f in (*k, *v)))
    rows = [i for axis in read.axes for i in axis if i not in over]
    batch, n = [i for i in rows if i in shared], [i for i in rows if i not in shared]
    stray = {i for axis in value.axes for i in axis} - {*batch, *n, *d}
    if not n or stray:
        return Mismatch("the result has an axis that no operand has, or the queries have none")
    return SoftmaxAttention(
        scores.term.coef,
        value.term.coef,
        q,
        k,
        v,
        tuple(batch),
        tuple(n),
        m,
        c,
        d,
        value.axes,
        read.leaf,
    )


def _in_common_indices(value: Value, read: Read, scores: Value) -> tuple[Value, Read, Value]:
    """All three in indices so fine that the softmax's axes are the scores'."""
    for dim in range(len(read.axes)):
        to_read, to_scores = refine(read.axes[dim], scores.axes[dim])
        value, read = value.substitute(to_read), read.substitute(to_read)
        scores = scores.substitute(to_scores)
    return value, read, scores


def _readout(term: Term, read: Read, known: Known) -> Roles | None:
    for roles in READOUT.solve(term, known):
        if isinstance(roles, Roles) and not roles.outer and len(roles.operands["p"]) == 1:
            (p,) = roles.operands["p"]
            if isinstance(p, Read) and p.leaf is read.leaf:
                return roles
    return None


def _scores(scores: Value, over: set[Index], known: Known) -> Roles | None:
    for roles in SCORES.solve(scores.term, known):
        if isinstance(roles, Roles) and not roles.outer and set(roles.letters["m"]) == over:
            return roles
    return None


def _softmax_below(leaf: Leaf) -> Leaf | None:
    """`leaf`, or what it was made from one operator after the other, where that is a softmax."""
    for _ in range(_MOST_STEPS):
        origin = leaf.origin
        if origin is None:
            return None
        if origin.operator in _SOFTMAX:
            return leaf
        inner = [v for v in _values(origin.args) if not v.term.fixed()]
        if len(inner) != 1 or inner[0].term.bound or len(inner[0].term.factors) != 1:
            return None  # beyond is another product, or another tensor
        (leaf,) = inner[0].term.leaves()
    return None


def _products_below(scores: Value) -> Iterator[Mismatch]:
    """Why scores that are no product are refused, where a product of q and k is inside them."""
    pending = [(leaf, 0) for leaf in scores.term.leaves()]
    while pending:
        leaf, steps = pending.pop(0)
        if leaf.origin is None or leaf.origin.operator not in _CHANGES or steps > _MOST_STEPS:
            continue
        for argument in _values(leaf.origin.args):
            if _is_product(argument):
                yield Mismatch(
                    f"`{leaf.operation}` changes the scores before the softmax, like a mask or a "
                    "bias, and block means cannot carry that; leave it out if it changes nothing"
                )
            pending += [(inner, steps + 1) for inner in argument.term.leaves()]


def _values(arguments: tuple[Any, ...]) -> list[Value]:
    return [a for a in arguments if isinstance(a, Value)]


def _is_product(value: Value) -> bool:
    """A contraction of two tensors that depend on the input."""
    reads = [f for f in value.term.factors if isinstance(f, Read) and not f.leaf.fixed]
    return bool(value.term.bound) and len(reads) > 1
