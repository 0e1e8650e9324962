"""Which inputs of a graph are weights: the algebra does not look through a projection.

Parameters, buffers and what else a module owns; and, where nobody owns it (functional_call, a
closure, an argument), a matrix that is nothing but the second operand of products with tensors of
more dims, so that every row of those meets all of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["weights"]

_PRODUCTS = {
    torch.nn.functional.linear,
    torch._C._nn.linear,
    torch.matmul,
    operator.matmul,
    "matmul",
}
_LAYOUT = {"t", "transpose", "permute", "contiguous", "to", torch.transpose, torch.permute, torch.t}


def weights(gm: fx.GraphModule) -> list[bool]:
    """For each placeholder of a Dynamo graph whether it is a weight."""
    inputs = gm.graph.find_nodes(op="placeholder")
    products = {node: list(_products(node)) for node in inputs if _rank(node) in (2, 3)}
    projections = {node: [p for p in found if p] for node, found in products.items() if all(found)}
    used = {product for found in projections.values() for product in found}
    # (x @ a) @ b without a step between is a product of three matrices
    chained = {p for p in used if used & {*p.users, *p.all_input_nodes}}
    return [
        _is_parameter(node) or bool(projections.get(node) and not chained & {*projections[node]})
        for node in inputs
    ]


def _products(node: fx.Node) -> Iterator[fx.Node | None]:
    """The projections by `node`; None for any other reader."""
    for user in node.users:
        if user.target in _LAYOUT or (user.target is getattr and user.args[1] in ("T", "mT")):
            yield from _products(user)
        elif user.target in _PRODUCTS:
            x, weight = user.args[0], user.args[1]
            found = weight is node and x is not node and _rank(node) == 2 and _rank(x) > 2
            yield user if found else None
        elif user.target is torch.einsum:
            yield user if _projects(user, node) else None
        else:
            yield None


def _projects(einsum: fx.Node, weight: fx.Node) -> bool:
    """Whether all letters that the other operand shares with `weight` are summed."""
    equation, *operands = einsum.args
    words, _, result = str(equation).replace(" ", "").partition("->")
    names = words.split(",")
    if len(operands) != 2 or len(names) != 2 or operands[1] is not weight or operands[0] is weight:
        return False
    x, w = map(set, names)
    return len(x & set(result)) > 1 and not x & w & set(result) and "." not in w


def _rank(node: Any) -> int:
    known = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return known.dim() if isinstance(known, torch.Tensor) else 0


def _is_parameter(placeholder: fx.Node) -> bool:
    """Whether a graph input is a parameter, a buffer or another tensor that a module owns."""
    known = placeholder.meta.get("example_value", placeholder.meta.get("val"))
    if isinstance(known, torch.nn.Parameter):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False
