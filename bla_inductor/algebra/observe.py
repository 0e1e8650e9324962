"""Run a graph on fake tensors and write down what every node is.

A node may be spelled in any way; below autograd it dissolves into a few ATen operators, which the
rules turn into Values. A Value is told in leaves, and every leaf is the result of a graph node, so
that a rewrite can name it: where a node's inner workings made a leaf of their own, the node's
result becomes the leaf.

The tensors are those that torch recorded when it traced the graph, and a node of one operator is
not computed again (`recorded`). Where nothing was recorded, or where a node changes the shape of a
tensor in place, so that the record is of no use, they are made anew and everything is run.

Nothing outside is changed: guards are suppressed, autocast and RNG state are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    disable_fake_tensor_cache,
)
from torch.utils import _pytree as pytree

from bla_inductor import compat
from bla_inductor.algebra.index import as_size
from bla_inductor.algebra.observation import Body, Observation, Opaque
from bla_inductor.algebra.observer import Observer, Reshaped
from bla_inductor.algebra.recorded import NotOne, tensors_in
from bla_inductor.algebra.regions import Regions, hooks, is_users, writes
from bla_inductor.algebra.term import Origin

__all__ = ["observe", "undisturbed"]

# Higher-order operators whose body is ordinary code of the user's, run once.
_TRANSPARENT = {
    "tag_activation_checkpoint",
    "invoke_subgraph",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}


class _Walk(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, observer: Observer, mode: FakeTensorMode, fixed: Sequence[bool]
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.observer, self.mode, self.fixed = observer, mode, iter(fixed)
        self.regions = Regions(observer)

    def leaf(
        self,
        value: Any,
        *,
        fixed: bool = False,
        node: fx.Node | None = None,
        origin: Origin | None = None,
    ) -> Any:
        """A recorded tensor as a leaf, or a new one with the metadata of `value`; other values as
        they are.
        """
        if not isinstance(value, torch.Tensor):
            return value
        plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
        if not (plain or isinstance(value, FakeTensor)) or value.layout != torch.strided:
            raise Opaque(f"an input is a {type(value).__name__}, which is not looked into")
        if id(value) in self.observer.values:
            return value  # an operand that a higher-order operator hands on
        if not self._trusted(value):
            value = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
        operation = "input" if origin is None else str(origin.operator)
        self.observer.new_leaf(value, fixed=fixed, operation=operation, node=node, origin=origin)
        return value

    def _trusted(self, value: Any) -> bool:
        return (
            self.observer.trusting
            and isinstance(value, FakeTensor)
            and value.fake_mode is self.mode
            and value.layout == torch.strided
        )

    def run_node(self, n: fx.Node) -> Any:
        self.observer.now += 1
        self.observer.seen.position[n] = self.observer.now
        result = self._run(n)
        if isinstance(result, torch.Tensor):
            self.observer.name(n, result)
            if any(map(hooks, n.users)):
                self.observer.cut_here(result, "register_hook", n)
        self.observer.name_overwritten()
        self.regions.note(n)
        return result

    def _run(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            real = super().run_node(n)
            if isinstance(real, torch.Tensor) and compat.is_transformed(real):
                raise Opaque(
                    "an input is of a torch.func transform (vmap, grad); compile the inner function"
                )
            if isinstance(real, list | tuple) and tensors_in(real):
                raise Opaque(
                    "its inputs are in a list, as those of a backward of compiled autograd, which "
                    "is not looked into"
                )
            if isinstance(real, torch.Tensor) and real.layout != torch.strided:
                raise Opaque(f"an input is a {real.layout} tensor, which is not looked into")
            known = n.meta.get("example_value", n.meta.get("val"))
            tensor = self.leaf(real if known is None else known, fixed=next(self.fixed), node=n)
            self._note_hints(known if isinstance(known, torch.SymInt) else tensor)
            if isinstance(real, torch.Tensor) and isinstance(tensor, torch.Tensor):
                seen = self.observer.seen
                seen.storage[tensor.untyped_storage()._cdata] = real.untyped_storage()._cdata
            return tensor
        if n.op == "get_attr":
            return self.leaf(self.fetch_attr(str(n.target)), fixed=True, node=n)
        known = n.meta.get("example_value", n.meta.get("val"))
        if isinstance(known, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return (
                known  # a size, or a scalar of the user's: running it again would make a new symbol
            )
        if self.regions.border(n):
            return None
        module = getattr(n.target, "__module__", None) or ""
        if compat.opens_transform(n.target):
            raise Opaque(
                "the graph holds forward-mode derivatives or a torch.func transform (vmap, grad); "
                "compile the inner function"
            )
        if module.startswith("torch.cuda"):
            return None
        if isinstance(n.target, HigherOrderOperator):
            return self._higher_order(n)
        if hooks(n):
            return None
        results = known if isinstance(known, tuple | list) else [known]
        recorded = bool(results) and all(map(self._trusted, results))
        if is_users(n):
            with enable_python_dispatcher():
                result = self.observer.watched(lambda: fx.Interpreter.run_node(self, n), n.name)
            return self.observer.as_recorded(result, known) if recorded else result
        if recorded:
            try:
                return self.observer.from_record(lambda: fx.Interpreter.run_node(self, n), known)
            except NotOne:
                pass
        with enable_python_dispatcher():
            result = super().run_node(n)
        return self.observer.as_recorded(result, known) if recorded else result

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
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        name = n.target.name() if isinstance(n.target, HigherOrderOperator) else ""
        bodies = self.observer.seen.bodies
        graphs = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, fx.GraphModule)]
        if "mutation" in name or any(map(writes, graphs)):
            for tensor in tensors_in((args, kwargs)):
                self.observer.may_be_written(tensor, name)
        if name == "cond":
            _, *branches, operands = args
            bodies += [Body(branch, self._fixed(operands), None) for branch in branches]
        elif name == "autograd_function_apply":  # its forward, whose gradient is the user's
            forward, _, *operands = args
            bodies.append(Body(forward, self._fixed(operands), None))
        elif name in _TRANSPARENT:
            at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
            flags = self._fixed(a for a in args[at + 1 :] if not isinstance(a, str))
            autocast = args[:at] if name == "wrap_with_autocast" else None
            bodies.append(Body(args[at], flags, autocast))
        known = n.meta.get("example_value", n.meta.get("val"))
        if known is None:
            raise Opaque(f"the higher-order operator {n.target} recorded no result")
        if name in _TRANSPARENT:
            return pytree.tree_map(self.leaf, known)
        operands = tensors_in(args)
        fixed = all(self._fixed(operands))
        origin = Origin(name, tuple(map(self.observer.value, operands)))
        for tensor in tensors_in(known):
            if id(tensor) in self.observer.values:
                self.observer.handed_on(tensor, name)
        return pytree.tree_map(lambda x: self.leaf(x, fixed=fixed, origin=origin), known)

    def _fixed(self, operands: Iterable[Any]) -> tuple[bool, ...]:
        return tuple(
            isinstance(a, torch.Tensor) and self.observer.value(a).term.fixed() for a in operands
        )


@contextlib.contextmanager
def undisturbed(mode: FakeTensorMode | None) -> Iterator[None]:
    """Grad mode, autocast, RNG and guards after this are what they were before.

    Inside, `mode` has no cache: keying and copying symbolic tensors for it takes three times as
    long as what it saves.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cache, rng = torch.is_autocast_cache_enabled(), torch.get_rng_state()
    nesting = _autocast_nesting()
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(disable_fake_tensor_cache(mode))
        if mode is not None and mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            while _autocast_nesting() > nesting:  # left in the middle of the user's region
                torch.autocast_decrement_nesting()
            torch.set_autocast_cache_enabled(cache)
            torch.set_rng_state(rng)
            for device, enabled, dtype in autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def observe(gm: fx.GraphModule, inputs: Sequence[Any], fixed: Sequence[bool]) -> Observation:
    """The Values of all nodes of `gm`.

    inputs: example inputs (tensors, real or fake, and symbolic integers), used where a placeholder
    has no metadata; fixed: for each placeholder, whether it is a parameter or a buffer. Raises
    Opaque when the graph holds something that must not be looked into.
    """
    known = [n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes]
    modes = [v.fake_mode for v in known if isinstance(v, FakeTensor)]
    context = TracingContext.try_get()
    if modes:
        try:
            return _observe(gm, inputs, fixed, modes[0], trusting=True)
        except Reshaped:
            pass
    mode = context.fake_mode if context is not None and context.fake_mode is not None else None
    if mode is None:
        mode = FakeTensorMode(shape_env=modes[0].shape_env if modes else None)
    return _observe(gm, inputs, fixed, mode, trusting=False)


def _observe(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    fixed: Sequence[bool],
    mode: FakeTensorMode,
    *,
    trusting: bool,
) -> Observation:
    seen = Observation(mode=mode)
    observer = Observer(seen, trusting=trusting)
    with undisturbed(mode), mode, observer:
        _Walk(gm, observer, mode, fixed).run(*inputs, enable_io_processing=False)
    return seen
