"""The dispatch mode that turns every ATen operator into Values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bla_inductor import compat
from bla_inductor.algebra import joined_rules, layout_rules, mask_rules, sum_rules
from bla_inductor.algebra.composites import Call, Dissolve
from bla_inductor.algebra.index import Inexpressible, as_size, axis_size, equal
from bla_inductor.algebra.integers import may_have_wrapped
from bla_inductor.algebra.memory import Memory
from bla_inductor.algebra.observation import Observation
from bla_inductor.algebra.recorded import NotOne, Recorded, tensors_in, written
from bla_inductor.algebra.registry import LAYOUT, RULES, Lookup, Unruled
from bla_inductor.algebra.standin import stand_in
from bla_inductor.algebra.term import Origin, Value
from bla_inductor.algebra.tiles import SLICE, origin_of_written

__all__ = ["Observer", "Reshaped"]

_ = (joined_rules, layout_rules, mask_rules, sum_rules)  # imported for the rules they register


_aten = torch.ops.aten
# These write to their running statistics, arguments 3 and 4, where argument 5 holds (training), and
# their schemas do not say so.
_STATISTICS = {
    _aten.batch_norm,
    _aten.instance_norm,
    _aten.native_batch_norm,
    _aten.cudnn_batch_norm,
    _aten.miopen_batch_norm,
}


class Reshaped(Exception):
    """An operator changed the shape of a tensor in place: what was recorded of it is not true."""


class Observer(Memory, TorchDispatchMode):
    """trusting: recorded tensors are among those observed, so that none may be reshaped."""

    def __init__(self, seen: Observation, *, trusting: bool) -> None:
        Memory.__init__(self, seen)
        TorchDispatchMode.__init__(self)
        self.trusting = trusting
        self.cut_off = False  # an operator ran where gradients are switched off
        self.recorded: Recorded | None = None
        self.slices: dict[Any, tuple[torch.Tensor, Value]] = {}
        self.casts: dict[tuple[int, torch.dtype], tuple[Value, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.cut_off |= not torch.is_grad_enabled()
        if torch.Tag.inplace_view in func.tags:
            if self.trusting:
                raise Reshaped
            self.seen.reshaped |= {id(t) for t in tensors_in(args[:1])}
        if self.recorded is not None:
            return self.recorded(func, args, kwargs)
        out = stand_in(func, args, kwargs) if self.trusting else None
        if out is None:
            out = func(*args, **kwargs)
        self._note(func, (func.overloadpacket, args, kwargs), out)
        return out

    def _note(self, func: Any, call: Call, out: Any) -> None:
        told = False
        if func._schema.is_mutable:
            self._write(func, call[1], call[2], out)
        else:
            told = self._record(call, out)
            packet, args, _ = call
            if packet in _STATISTICS and (len(args) < 6 or args[5]):
                for tensor in tensors_in(args[3:5]):
                    self.may_be_written(tensor, packet.__name__)
        if torch.Tag.nondeterministic_seeded in func.tags and not told:
            self.seen.draws.add(self.now)  # a dropout of nothing is told, and draws nothing

    def from_record(self, run: Callable[[], Any], result: Any) -> Any:
        """`run()`, a node that gave `result` when it was traced, without computing anything.

        Raises NotOne where it has to be run for good; nothing is noted then but casts.
        """
        (first, *_) = tensors_in(result)
        device = first.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        recorded = self.recorded = Recorded(result, self._cast if autocast else None)
        try:
            with compat.below_autograd():
                got = run()
            noted = recorded.call(got)
            if noted is not None:
                self._note(*noted)
            else:
                self._hand_out(tensors_in(got))
        except (NotOne, Reshaped):
            raise
        except Exception as e:  # what followed the operator did not expect the record
            raise NotOne from e
        finally:
            self.recorded = None
        return got

    def watched(self, run: Callable[[], Any], name: str) -> Any:
        """`run()`, code of the user's. Where part of it runs without gradients (in a `no_grad`
        region, or in an autograd.Function, which brings its own), what it returns are leaves.
        """
        self.cut_off = False
        with torch.enable_grad():
            result = run()
        if self.cut_off:
            for tensor in tensors_in(result):
                self.cut_here(tensor, name)
        return result

    def as_recorded(self, got: Any, result: Any) -> Any:
        """`got`, a new tensor that a node gave now, in the one that was recorded of the node."""
        if not isinstance(got, torch.Tensor) or not isinstance(result, torch.Tensor):
            return got
        new = id(got) in self.values and not {id(got), id(result)} & self.node_of.keys()
        if not new or id(result) in self.values or not _alike(got, result):
            return got
        value, here = self.values[id(got)], self.seen.storage_of(got)
        for leaf in value.term.leaves():
            if self.leaf_storage.get(leaf) == here:
                self.leaf_storage[leaf] = self.seen.storage_of(result)
        self.keep(result, value)
        return result

    def _hand_out(self, tensors: list[torch.Tensor]) -> None:
        """A node returns tensors that were there before; a cast among them is the user's now."""
        if not all(id(t) in self.values for t in tensors):
            raise NotOne
        self.casts = {k: v for k, v in self.casts.items() if all(v[1] is not t for t in tensors)}

    def _cast(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Autocast's cast of a tensor, made once for as long as the tensor is not written."""
        x, *more = args
        value = self.value(x)
        dtypes = [a for a in (*more, *kwargs.values()) if isinstance(a, torch.dtype)]
        key = id(x), dtypes[0] if dtypes else x.dtype
        if key in self.casts and self.casts[key][0] is value:
            return self.casts[key][1]
        out = func(*args, **kwargs)
        if out is not x:
            self._record((torch.ops.aten._to_copy, (x,), {}), out)
            self.casts[key] = value, out
        return out

    def _apply(
        self, packet: Any, out: Any, args: Any, kwargs: Any, lookup: Lookup | None = None
    ) -> list[Value | None]:
        """The rule's Values for the tensors of `out`, or None for each that must be a leaf."""
        outs = tensors_in(out)
        rule = RULES.get(packet)
        if rule is not None and self._converts(outs, args):
            rule = None
        result: Any = None
        if rule is not None:
            try:
                result = rule(lookup or self, out, *args, **kwargs)
            except Dissolve:
                if self.recorded is not None:
                    raise
            except (Inexpressible, Unruled):
                pass
            except Exception as e:  # a rule may not cost the user their compile: a leaf instead
                self.seen.errors.append(f"{packet}: {type(e).__name__}: {e}")
        values = result if isinstance(result, Sequence) else [result] * len(outs)
        told = [self._checked(packet, v, t) for v, t in zip(values, outs, strict=True)]
        if rule is not None:
            self.seen.rules[f"{packet.__name__} tried"] += 1
            self.seen.rules[packet.__name__] += any(v is not None for v in told)
        return told

    def _converts(self, outs: Sequence[torch.Tensor], args: Any) -> bool:
        """Whether integers that may have wrapped around are read as another dtype."""
        dtypes = {out.dtype for out in outs} - {torch.bool}
        return any(
            dtypes != {x.dtype} and dtypes and may_have_wrapped(self.value(x))
            for x in tensors_in(args)
            if not x.dtype.is_floating_point and x.dtype.itemsize < 8
        )

    def _checked(self, packet: Any, value: Value | None, tensor: torch.Tensor) -> Value | None:
        """A Value whose axes disagree with the shape comes of a wrong rule: it is not believed."""
        if value is None:
            return None
        right = len(value.axes) == tensor.dim() and all(
            equal(axis_size(a), as_size(s)) for a, s in zip(value.axes, tensor.shape, strict=True)
        )
        if self.recorded is not None and not (right and value.dtype == tensor.dtype):
            raise Dissolve  # more follows: as the record has what it does, nothing was left to do
        if not right:
            self.seen.errors.append(f"{packet}: axes {value.axes} for shape {tuple(tensor.shape)}")
        return value if right else None

    def _record(self, call: Call, out: Any) -> bool:
        """Whether a rule has told all results."""
        outs = tensors_in(out)
        if not outs:
            return False
        packet, args, kwargs = call
        values = self._apply(packet, out, args, kwargs)
        fixed = None
        for tensor, value in zip(outs, values, strict=True):
            if value is None:
                fixed = self._fixed(args, kwargs) if fixed is None else fixed
                origin = self._origin(packet, args, kwargs) if len(outs) == 1 else None
                self.new_leaf(tensor, fixed=fixed, operation=packet.__name__, origin=origin)
            else:
                self.keep(tensor, self._again(tensor, value))
        if packet in LAYOUT and id(args[0]) in self.cuts:
            cut, *_ = self._apply(packet, out, args, kwargs, _Cut(self))
            if cut is not None:
                self.cuts[id(out)] = cut
        return None not in values

    def _again(self, tensor: torch.Tensor, value: Value) -> Value:
        """A slice that the program takes twice (`q[i] @ s / (q[i] @ z)`) is one leaf, where nothing
        was done to the first since.
        """
        leaf = next(value.term.leaves(), None)
        if leaf is None or leaf.origin is None or leaf.origin.operator != SLICE:
            return value
        if leaf in self.leaf_storage:  # a view of a slice
            return value
        (whole, dim, start), known = leaf.origin.args, leaf.origin.kwargs
        key = (id(whole), dim, start, leaf.shape, known)
        first, before = self.slices.get(key, (tensor, value))
        if self.values.get(id(first)) is before:
            return before
        self.slices[key] = tensor, value
        return value

    def _origin(self, packet: Any, args: Any, kwargs: Any) -> Origin:
        """How a leaf was made, told in Values: feature maps and signs are read off it."""

        def told(x: Any) -> Any:
            return self.value(x) if isinstance(x, torch.Tensor) else x

        return Origin(packet, tuple(map(told, args)), tuple(kwargs.items()))

    def _fixed(self, args: Any, kwargs: Any) -> bool:
        terms = [self.value(t).term for t in tensors_in((args, kwargs))]
        return all(leaf.fixed for term in terms for leaf in term.leaves())

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An in-place operator: the tensor written gets a new Value, its aliases become leaves."""
        targets = written(func, args, kwargs)
        packet = func.overloadpacket
        pure = getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)
        for target in targets:
            value = None
            if len(targets) == 1 and out is target and pure is not None:
                others = {k: v for k, v in kwargs.items() if v is not target}
                (value,) = self._apply(pure, target, args, others)
            fixed = self._fixed(args, kwargs)
            origin = origin_of_written(self._origin(packet, args, kwargs))
            sources = [self.value(t) for t in tensors_in((args, kwargs)) if t is not target]
            storage = self.seen.storage_of(target)
            self.overwritten.append(target)
            self.cuts = {i: v for i, v in self.cuts.items() if not self.lives_in(v, storage)}
            self.seen.writes.setdefault(storage, []).append(self.now)
            if value is not None and self.lives_in(value, storage):
                value = None
            for alias in list(self.by_storage.get(storage, [])):
                if alias is not target:
                    node, name = self.node_of.get(id(alias)), packet.__name__
                    was = origin_of_written(Origin(packet, (self.value(alias), *sources)))
                    if was is not None:  # not told entry by entry: it may be a view in other axes
                        was = replace(was, operator=packet)
                    self.new_leaf(alias, fixed=fixed, operation=name, node=node, origin=was)
            if value is not None:
                self.keep(target, value)
            else:
                self.new_leaf(target, fixed=fixed, operation=packet.__name__, origin=origin)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.dim() == b.dim()
        and all(equal(as_size(x), as_size(y)) for x, y in zip(a.shape, b.shape, strict=True))
    )


class _Cut:
    """The tensors of an observer told in the leaves that a longer chain starts from."""

    def __init__(self, observer: Observer) -> None:
        self.cut = observer.cut

    def __call__(self, tensor: torch.Tensor) -> Value:
        return self.cut(tensor)
