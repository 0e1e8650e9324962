"""Where the user's gradients are other than those of what is computed: `no_grad`, inference mode,
hooks on tensors, and code that Dynamo did not look into, which may do all of it, or bring
derivatives of its own.

Terms never reach into or across such a place: gradients would flow where they did not.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from bla_inductor.algebra.composites import is_composite
from bla_inductor.algebra.observer import Observer

__all__ = ["Regions", "hooks", "is_differentiated", "is_users", "writes"]

_ENTER = torch.autograd.grad_mode._enter_inference_mode
_EXIT = torch.autograd.grad_mode._exit_inference_mode
_WRITING = {"__setitem__", "batch_norm", "instance_norm"}
_IN_PLACE = (
    {"setitem", "delitem"}
    | {  # and iadd, iand, …
        name
        for name in operator.__all__
        if name[0] == "i" and {name[1:], f"{name[1:]}_"} & {*operator.__all__}
    }
)
_TORCHS = {"torch", "_operator", "operator", "builtins", "math"}


class Regions:
    """The regions of a graph that run without gradients, followed node by node."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._inside: list[fx.Node] | None = None  # the nodes of the region so far
        self._nested: list[bool] = []  # for each open inference mode, whether it is in a region

    def note(self, node: fx.Node) -> None:
        if self._inside is not None:
            self._inside.append(node)

    def border(self, n: fx.Node) -> bool:
        """Whether `n` begins or ends a region; it is not run then."""
        if n.target is torch._C._set_grad_enabled:
            (self._leave if n.args[0] else self._enter)()
        elif n.target is _ENTER:
            self._nested.append(self._inside is not None)
            self._enter()
        elif n.target is _EXIT:
            if not self._nested.pop():
                self._leave()
        else:
            return False
        return True

    def _enter(self) -> None:
        if self._inside is None:
            self._inside = []

    def _leave(self) -> None:
        observer = self._observer
        inside = self._inside
        for node in self._entered_outside() if inside is None else self._reached(inside):
            tensor = observer.seen.tensors.get(node)
            if tensor is not None:
                observer.cut_here(tensor, "no_grad", node)
        self._inside = None

    def _reached(self, inside: list[fx.Node]) -> list[fx.Node]:
        """A region's nodes, and those outside of it that it has written to."""
        seen, own = self._observer.seen, set(inside)
        start = min((seen.position[n] for n in inside), default=self._observer.now) - 1
        return [*inside, *(n for n in seen.tensors if n not in own and seen.written(n, start))]

    def _entered_outside(self) -> list[fx.Node]:
        """The nodes so far that have no gradient although what they are made of has one: the graph
        begins in a region that was entered outside of it.
        """
        found: dict[fx.Node, None] = {}
        for node, tensor in self._observer.seen.tensors.items():
            differentiable = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            above = any(is_differentiated(x) or x in found for x in node.all_input_nodes)
            if differentiable and above and not is_differentiated(node):
                found[node] = None
        return list(found)


def is_differentiated(node: fx.Node) -> bool:
    """Whether autograd recorded it, by its metadata."""
    known = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(known, torch.Tensor) and known.requires_grad


def hooks(n: fx.Node) -> bool:
    """Whether `n` registers a hook, which every gradient of its argument runs through, also that of
    what was made before. Compiled autograd has a function for it.
    """
    if isinstance(n.target, HigherOrderOperator):
        return n.target.name() == "register_hook"
    return getattr(n.target, "__name__", None) == "_register_hook_trampoline"


def is_users(n: fx.Node) -> bool:
    """Whether `n` runs code that Dynamo did not look into and that is not torch's own: a function
    of the user's (`allow_in_graph`), or an operator of theirs that torch dissolves.
    """
    if n.op == "call_module":
        return True
    if n.op != "call_function":
        return False
    if isinstance(n.target, OpOverload | OpOverloadPacket):
        packet = n.target.overloadpacket if isinstance(n.target, OpOverload) else n.target
        theirs = packet._qualified_op_name.partition("::")[0] not in ("aten", "prim", "prims")
        return theirs and any(is_composite(getattr(packet, name)) for name in packet.overloads())
    module = getattr(n.target, "__module__", None)  # methods of tensors have none
    return module is not None and module.partition(".")[0] not in _TORCHS


def writes(body: fx.GraphModule) -> bool:
    """Whether a node of `body`, the graph of a higher-order operator, may write to memory."""
    return any(map(_may_write, body.graph.nodes)) or any(
        writes(module) for _, module in body.named_children() if isinstance(module, fx.GraphModule)
    )


def _may_write(n: fx.Node) -> bool:
    if n.op not in ("call_function", "call_method"):
        return n.op == "call_module"
    if "out" in n.kwargs or n.kwargs.get("inplace") or n.kwargs.get("training"):
        return True
    if isinstance(n.target, OpOverload):
        return n.target._schema.is_mutable
    if isinstance(n.target, OpOverloadPacket):
        return any(getattr(n.target, o)._schema.is_mutable for o in n.target.overloads())
    if isinstance(n.target, HigherOrderOperator):
        return "mutation" in n.target.name()
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    if isinstance(n.target, str) or getattr(n.target, "__module__", "") != "_operator":
        return (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    return name in _IN_PLACE
