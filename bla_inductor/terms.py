"""Terms as text: what the algebra made of each node of a graph.

    q                        float32[2, 64, 32]  (a b c)
    k                        float32[2, 64, 32]  (a b c)
    matmul                   float32[2, 32, 32]  (a b c)
        = Σ(d=64) k[a, d, b] · v[a, d, c]
    matmul_1                 float32[2, 64, 32]  (a b c)
        = Σ(d=64 e=32) q[a, b, e] · k[a, d, e] · v[a, d, c]

Letters are indices, with their sizes where a sum binds them; within one node, and only there, the
same letter is the same index. A pair like (b c) is one axis of two indices, _ an axis of size one.
A node without a line of its own is a leaf: the algebra does not look into it.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

from bla_inductor.algebra import Axes, Delta, Guard, Index, Mask, Observation, Read, Term

__all__ = ["described"]


def described(seen: Observation) -> Iterator[str]:
    """Lines for every node with a tensor result, in the order of the graph."""
    for node, value in seen.values.items():
        dtype = str(value.dtype).removeprefix("torch.")
        letters = _Letters()
        axes = letters.axes(value.axes, " ")
        sizes = ", ".join(str(size) for size in seen.tensors[node].shape)
        kind = " (parameter, buffer or made of them)" if value.term.fixed() else ""
        yield f"{node.name:<24} {dtype}[{sizes}]  ({axes}){kind}"
        own = value.term.factors
        leaf = len(own) == 1 and isinstance(own[0], Read) and own[0].leaf.node is node
        if not leaf:
            yield f"    = {letters.term(value.term)}"


class _Letters:
    """Names of the indices of one Value."""

    def __init__(self) -> None:
        words = itertools.chain.from_iterable(
            itertools.product(string.ascii_lowercase, repeat=n) for n in itertools.count(1)
        )
        self.fresh = ("".join(word) for word in words)
        self.known: dict[Index, str] = {}

    def index(self, index: Index) -> str:
        if index not in self.known:
            self.known[index] = next(self.fresh)
        return self.known[index]

    def axes(self, axes: Axes, between: str) -> str:
        def one(axis: tuple[Index, ...]) -> str:
            names = " ".join(map(self.index, axis)) or "_"
            return f"({names})" if len(axis) > 1 else names

        return between.join(map(one, axes))

    def term(self, term: Term) -> str:
        bound = " ".join(f"{self.index(i)}={i.size}" for i in term.bound)
        coef = [] if term.coef == 1 else [f"{term.coef}"]
        product = " · ".join([*coef, *map(self.factor, term.factors)]) or "1"
        return f"Σ({bound}) {product}" if bound else product

    def factor(self, factor: Read | Guard | Mask | Delta) -> str:
        match factor:
            case Read():
                text = f"{factor.leaf}[{self.axes(factor.axes, ', ')}]"
                return text if factor.power == 1 else f"{text}^{factor.power}"
            case Guard():
                inside = self.term(factor.term)
                text = (
                    f"max({inside}, {factor.eps})"
                    if factor.kind == "clamp"
                    else f"({inside})"
                    if factor.eps == 0
                    else f"({inside} + {factor.eps})"
                )
                return text if factor.power == 1 else f"{text}^{factor.power}"
            case _:
                names = " ".join(sorted(self.index(i) for i in factor.indices()))
                return f"{type(factor).__name__.lower()}[{names}]"
