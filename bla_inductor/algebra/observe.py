"""Run a graph on fake tensors and write down what every node is.

A node may be spelled in any way; below autograd it dissolves into a few ATen operators, which the
rules turn into Values. A Value is told in leaves, and every leaf is the result of a graph node, so
that a rewrite can
name it: where a node's inner workings made a leaf of their own, the node's result becomes the leaf.

Nothing outside is changed: tensors are made anew from the metadata, guards are suppressed, autocast
and RNG state are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bla_inductor.algebra import joined_rules, layout_rules, product_rules
from bla_inductor.algebra.index import Inexpressible, Size, as_size, axis_size, equal
from bla_inductor.algebra.registry import LAYOUT, RULES, Lookup, Unruled
from bla_inductor.algebra.term import Leaf, Read, Term, Value, leaf_value

__all__ = ["Body", "Observation", "Opaque", "observe", "undisturbed"]

_ = (joined_rules, layout_rules, product_rules)  # imported for the rules they register
_UNKNOWN = 4096  # what an unbacked size is taken to be where a decision needs a number
# Higher-order operators whose body is ordinary code of the user's, run once.
_TRANSPARENT = {
    "tag_activation_checkpoint",
    "invoke_subgraph",
    "wrap",
    "wrap_activation_checkpoint",
}


class Opaque(Exception):
    """The graph cannot be observed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Body:
    """The graph inside a higher-order operator; `fixed[i]`: argument i is a parameter or like one."""

    module: fx.GraphModule
    fixed: tuple[bool, ...]


@dataclass(slots=True)
class Observation:
    """What was seen: a Value and a fake tensor for every node with a tensor result."""

    values: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    position: dict[fx.Node, int] = field(default_factory=dict)
    bodies: list[Body] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    writes: dict[int, list[int]] = field(default_factory=dict)
    storage: dict[int, int] = field(default_factory=dict)
    shape_env: Any = None
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    def hint(self, size: Size) -> int:
        """A likely number for a size; a large one where nothing is known."""
        if isinstance(size, int):
            return size
        value = size.xreplace({s: sympy.Integer(h) for s, h in self.hints.items()})
        return int(value) if value.is_number else _UNKNOWN

    def storage_of(self, tensor: torch.Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        return self.storage.get(key, key)

    def written(self, node: fx.Node, after: int, before: int | None = None) -> bool:
        """Whether the memory of `node` is written to after position `after` (and before `before`)."""
        writes = self.writes.get(self.storage_of(self.tensors[node]), ())
        return any(after < w and (before is None or w < before) for w in writes)


class _Observer(TorchDispatchMode):
    def __init__(self, seen: Observation) -> None:
        super().__init__()
        self.seen = seen
        self.values: dict[int, Value] = {}
        self.kept: list[torch.Tensor] = []
        self.by_storage: dict[int, list[torch.Tensor]] = {}
        self.leaf_storage: dict[Leaf, int] = {}
        self.node_of: dict[int, fx.Node] = {}
        self.cuts: dict[int, Value] = {}
        self.now = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._write(func, args, kwargs, out)
        else:
            self._record(func, args, kwargs, out)
        return out

    def value(self, tensor: torch.Tensor) -> Value:
        known = self.values.get(id(tensor))
        return known if known is not None else self.new_leaf(tensor, fixed=False)

    def __call__(self, tensor: torch.Tensor) -> Value:
        return self.value(tensor)

    def cut(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self.cuts:
            raise Unruled
        return self.cuts[id(tensor)]

    def new_leaf(
        self,
        tensor: torch.Tensor,
        *,
        fixed: bool,
        operation: str = "input",
        node: fx.Node | None = None,
    ) -> Value:
        shape = tuple(as_size(s) for s in tensor.shape)
        leaf = Leaf(shape, tensor.dtype, fixed, operation, node, self.now)
        return self.keep(tensor, leaf_value(leaf))

    def keep(self, tensor: torch.Tensor, value: Value) -> Value:
        storage = self.seen.storage_of(tensor)
        if id(tensor) not in self.values:
            self.kept.append(tensor)
            self.by_storage.setdefault(storage, []).append(tensor)
        self.values[id(tensor)] = value
        for leaf in value.term.leaves():
            self.leaf_storage.setdefault(leaf, storage)
        return value

    def _apply(
        self, packet: Any, out: Any, args: Any, kwargs: Any, lookup: Lookup | None = None
    ) -> list[Value | None]:
        """The rule's Values for the outputs, or None for each that must be a leaf."""
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        rule = RULES.get(packet)
        result: Any = None
        if rule is not None:
            try:
                result = rule(lookup or self, out, *args, **kwargs)
            except (Inexpressible, Unruled):
                pass
            except (
                Exception
            ) as e:  # a rule must never cost the user their compile: the result is a leaf
                self.seen.errors.append(f"{packet}: {type(e).__name__}: {e}")
        values = result if isinstance(result, Sequence) else [result] * len(outs)
        return [self._checked(packet, v, t) for v, t in zip(values, outs, strict=True)]

    def _checked(self, packet: Any, value: Value | None, tensor: torch.Tensor) -> Value | None:
        """A Value whose axes disagree with the tensor's shape would be a wrong rule: do not believe
        it.
        """
        if value is None:
            return None
        right = len(value.axes) == tensor.dim() and all(
            equal(axis_size(a), as_size(s)) for a, s in zip(value.axes, tensor.shape, strict=True)
        )
        if not right:
            self.seen.errors.append(f"{packet}: axes {value.axes} for shape {tuple(tensor.shape)}")
        return value if right else None

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not outs:
            return
        flat = isinstance(out, torch.Tensor | tuple | list)
        values = self._apply(func.overloadpacket, out, args, kwargs) if flat else [None] * len(outs)
        fixed = None
        for tensor, value in zip(outs, values, strict=True):
            if value is None:
                fixed = self._fixed(args, kwargs) if fixed is None else fixed
                self.new_leaf(tensor, fixed=fixed, operation=func.overloadpacket.__name__)
            else:
                self.keep(tensor, value)
        if func.overloadpacket in LAYOUT and id(args[0]) in self.cuts:
            values = self._apply(func.overloadpacket, out, args, kwargs, _Cut(self))
            if values[0] is not None:
                self.cuts[id(out)] = values[0]

    def _fixed(self, args: Any, kwargs: Any) -> bool:
        terms = [
            self.value(t).term
            for t in pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        ]
        return all(term.fixed() or not term.factors for term in terms)

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An in-place operator: the tensor written gets a new Value, its aliases become leaves."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        targets = [
            t
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
            for t in pytree.tree_leaves(named.get(a.name))
            if isinstance(t, torch.Tensor)
        ]
        packet = func.overloadpacket
        pure = getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)
        for target in targets:
            value = None
            if len(targets) == 1 and out is target and pure is not None:
                (value,) = self._apply(pure, target, args, kwargs)
            fixed = self._fixed(args, kwargs)
            storage = self.seen.storage_of(target)
            self.cuts = {i: v for i, v in self.cuts.items() if not self._lives_in(v, storage)}
            self.seen.writes.setdefault(storage, []).append(self.now)
            if value is not None and self._lives_in(value, storage):
                value = None
            for alias in list(self.by_storage.get(storage, [])):
                if alias is not target:
                    node = self.node_of.get(id(alias))
                    self.new_leaf(alias, fixed=fixed, operation="written", node=node)
            if value is not None:
                self.keep(target, value)
            else:
                self.new_leaf(target, fixed=fixed, operation=packet.__name__)

    def _lives_in(self, value: Value, storage: int) -> bool:
        return any(self.leaf_storage.get(leaf) == storage for leaf in value.term.leaves())

    def name(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """`node` made `tensor`: from here on leaves that live in it can be read as the node's
        result.
        """
        value = self.value(tensor)
        unnamed = [leaf for leaf in value.term.leaves() if leaf.node is None]
        if unnamed:
            (leaf, *others) = unnamed
            whole = Read(leaf, value.axes, leaf.dtype)
            if not others and value == Value(Term((whole,)), value.axes, leaf.dtype):
                leaf.node, leaf.born = node, self.now
            else:
                fixed = value.term.fixed()
                value = self.new_leaf(tensor, fixed=fixed, operation=node.name, node=node)
        self.node_of.setdefault(id(tensor), node)
        value = self.seen.values[node] = self.values[id(tensor)]
        self.seen.tensors[node] = tensor
        if value.term.depth > 1:
            shape = tuple(as_size(s) for s in tensor.shape)
            leaf = Leaf(shape, tensor.dtype, value.term.fixed(), "chain", node, self.now)
            self.leaf_storage[leaf] = self.seen.storage_of(tensor)
            self.cuts[id(tensor)] = leaf_value(leaf)


class _Cut:
    """The tensors of an observer told in the leaves that a longer chain starts from."""

    def __init__(self, observer: _Observer) -> None:
        self.cut = observer.cut

    def __call__(self, tensor: torch.Tensor) -> Value:
        return self.cut(tensor)


class _Walk(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, observer: _Observer, mode: FakeTensorMode, fixed: Sequence[bool]
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.observer, self.mode, self.fixed = observer, mode, iter(fixed)
        self.region: list[fx.Node] | None = None  # the nodes of a `no_grad` region of the user's

    def fake(self, value: Any, *, fixed: bool = False, node: fx.Node | None = None) -> Any:
        """A new fake tensor with the metadata of `value`; other values as they are."""
        if not isinstance(value, torch.Tensor):
            return value
        plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
        if not (plain or isinstance(value, FakeTensor)) or value.layout != torch.strided:
            raise Opaque(f"an input is a {type(value).__name__}, which is not looked into")
        tensor = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        self.observer.new_leaf(tensor, fixed=fixed, node=node)
        return tensor

    def run_node(self, n: fx.Node) -> Any:
        self.observer.now += 1
        self.observer.seen.position[n] = self.observer.now
        result = self._run(n)
        if isinstance(result, torch.Tensor):
            self.observer.name(n, result)
        if self.region is not None:
            self.region.append(n)
        return result

    def _run(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            real = super().run_node(n)
            known = n.meta.get("example_value", n.meta.get("val"))
            tensor = self.fake(real if known is None else known, fixed=next(self.fixed), node=n)
            self._note_hints(known if isinstance(known, torch.SymInt) else tensor)
            if isinstance(real, torch.Tensor) and isinstance(tensor, torch.Tensor):
                seen = self.observer.seen
                seen.storage[tensor.untyped_storage()._cdata] = real.untyped_storage()._cdata
            return tensor
        if n.op == "get_attr":
            return self.fake(self.fetch_attr(str(n.target)), fixed=True, node=n)
        known = n.meta.get("example_value", n.meta.get("val"))
        if isinstance(known, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return (
                known  # a size, or a scalar of the user's: running it again would make a new symbol
            )
        if n.target is torch._C._set_grad_enabled:
            self._grad_mode(bool(n.args[0]))
            return None
        module = getattr(n.target, "__module__", None) or ""
        if "functorch" in module and "_nesting" in getattr(n.target, "__name__", ""):
            raise Opaque(
                "the graph holds a torch.func transform (vmap, grad); compile the inner function"
            )
        if module.startswith("torch.cuda"):
            return None
        if isinstance(n.target, HigherOrderOperator):
            return self._higher_order(n)
        return super().run_node(n)

    def _note_hints(self, value: Any) -> None:
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(expr := as_size(size), sympy.Symbol):
                hint = size.node.hint
                if isinstance(hint, int):
                    self.observer.seen.hints[expr] = hint

    def _higher_order(self, n: fx.Node) -> Any:
        """Not executed: the results are made from the recorded metadata, the body is visited on its
        own.
        """
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target.name() in _TRANSPARENT if callable(n.target.name) else False:  # type: ignore[union-attr]
            operands = [a for a in args if not isinstance(a, fx.GraphModule | str)]
            flags = tuple(
                isinstance(a, torch.Tensor) and self.observer.value(a).term.fixed()
                for a in operands
            )
            for arg in args:
                if isinstance(arg, fx.GraphModule):
                    self.observer.seen.bodies.append(Body(arg, flags))
        known = n.meta.get("example_value", n.meta.get("val"))
        if known is None:
            raise Opaque(f"the higher-order operator {n.target} recorded no result")
        return pytree.tree_map(self.fake, known)

    def _grad_mode(self, enabled: bool) -> None:
        """Terms never reach into a finished no_grad region: gradients would flow where they did
        not.
        """
        if enabled and self.region is not None:
            for node in self.region:
                tensor = self.observer.seen.tensors.get(node)
                if tensor is not None:
                    fixed = self.observer.value(tensor).term.fixed()
                    self.observer.new_leaf(tensor, fixed=fixed, operation="no_grad", node=node)
        self.region = None if enabled else []


@contextlib.contextmanager
def undisturbed(shape_env: Any) -> Iterator[None]:
    """Grad mode, autocast, RNG and guards after this are what they were before."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cache, rng = torch.is_autocast_cache_enabled(), torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        if shape_env is not None:
            stack.enter_context(shape_env.suppress_guards())
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)
            torch.set_rng_state(rng)
            for device, enabled, dtype in autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def observe(gm: fx.GraphModule, inputs: Sequence[Any], fixed: Sequence[bool]) -> Observation:
    """The Values of all nodes of `gm`.

    inputs: example inputs (tensors, real or fake, and symbolic integers), used where a placeholder
    has no metadata; fixed: for each placeholder, whether it is a parameter or a buffer. Raises
    Opaque when the graph holds something that must not be looked into.
    """
    context = TracingContext.try_get()
    known = [n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes]
    modes = [v.fake_mode for v in known if isinstance(v, FakeTensor)]
    mode = context.fake_mode if context is not None and context.fake_mode is not None else None
    if mode is None:
        mode = FakeTensorMode(shape_env=modes[0].shape_env if modes else None)
    seen = Observation(shape_env=mode.shape_env)
    observer = _Observer(seen)
    with undisturbed(mode.shape_env), mode, enable_python_dispatcher(), observer:
        _Walk(gm, observer, mode, fixed).run(*inputs, enable_io_processing=False)
    return seen
