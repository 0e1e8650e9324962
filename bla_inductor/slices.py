"""Where a tensor, or a slice of one, is after views: shared by the passes that save copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "LAYOUT",
    "NO_VIEW",
    "VIEWS",
    "Inexpressible",
    "Slice",
    "descendants",
    "is_static",
    "moved",
    "only_user",
    "permutation",
    "to_contiguous",
    "undone",
    "value",
    "way",
]

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
LAYOUT = (*VIEWS, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim)
# What `view` raises of memory that has no such view; ValueError while a FakeTensorMode is active.
NO_VIEW = (RuntimeError, ValueError)


class Inexpressible(Exception):
    """What was a slice of one dim, or a view, is none after a view."""


@dataclass
class Slice:
    """[start, start + length) of dim `dim`; shapes: the slice's own after each view."""

    dim: int
    start: int
    length: int
    shapes: list[list[int]]


def value(node: Any) -> Tensor:
    """The fake tensor of a node."""
    fake = node.meta["val"]
    assert isinstance(fake, Tensor)
    return fake


def is_static(*nodes: fx.Node) -> bool:
    return all(isinstance(s, int) for n in nodes for s in (*value(n).shape, *value(n).stride()))


def descendants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found = set(nodes)
    for node in nodes[0].graph.nodes:
        if any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def permutation(view: fx.Node) -> list[int]:
    rank = value(view).dim()
    order: Any = view.args[1]
    return [d % rank for d in order]


def to_contiguous(top: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """(views of `top`, the `contiguous` after them), if each is read by nothing else; or none, and
    `top`.
    """
    views: list[fx.Node] = []
    node = top
    while (user := only_user(node)) is not None and user.target in (*VIEWS, aten.permute.default):
        views.append(user)
        node = user
    if user is not None and user.target is aten.clone.default and value(user).is_contiguous():
        return views, user
    return [], top


def way(x: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Views of x and copies of the whole, as `contiguous` makes, each read by the next alone; and
    what reads the last of them alone, if there is such a node.
    """
    nodes: list[fx.Node] = []
    while (user := only_user(nodes[-1] if nodes else x)) is not None:
        copy = user.target is aten.clone.default and value(user).is_contiguous()
        if not copy and user.target not in LAYOUT:
            break
        nodes.append(user)
    return nodes, user


def undone(view: fx.Node, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The input of `view`, of `shape`, as a view of its result x. Raises Inexpressible if it is
    none.
    """
    if view.target is aten.clone.default:
        return x
    if view.target is aten.permute.default:
        order = permutation(view)
        return x.permute([order.index(d) for d in range(x.dim())])
    try:
        return x.view(shape)
    except NO_VIEW as error:
        raise Inexpressible(str(error)) from error


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def moved(top: fx.Node, views: Sequence[fx.Node], dim: int, start: int, length: int) -> Slice:
    """The slice of `top`, after `views`. Raises Inexpressible."""
    shapes: list[list[int]] = []
    for view in views:
        target = value(view).shape
        if view.target is aten.permute.default:
            dim = permutation(view).index(dim)
        else:
            source: Any = view.args[0]
            dim, start, length = _through(value(source).shape, target, dim, start, length)
        shapes.append([length if d == dim else s for d, s in enumerate(target)])
    return Slice(dim, start, length, shapes)


def _through(
    source: Sequence[int], target: Sequence[int], dim: int, start: int, length: int
) -> tuple[int, int, int]:
    """(dim, start, length) of a slice of `source` in a view of size `target`."""
    before, inner = prod(source[:dim]), prod(source[dim + 1 :])
    outer = 1
    for d, size in enumerate(target):
        own = prod(target[d + 1 :])
        if outer == before and size > 1 and start * inner % own == 0 and length * inner % own == 0:
            return d, start * inner // own, length * inner // own
        outer *= size
    raise Inexpressible(f"a slice of dim {dim} of {list(source)} in {list(target)}")
