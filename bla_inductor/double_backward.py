"""Where AOTAutograd has no second derivative, an error that says where and what to do.

AOTAutograd makes an autograd.Function for each graph. Its backward can be recorded
(create_graph=True), and what was recorded raises when it is run. The operator is twice
differentiable, so one option mends it, which our error tells: the backward of that one Function is
given a second step, which has our error raised where torch's would be.

Autograd's own hooks would do without the replacement, but not without harm: one after the node has
autograd keep the node's incoming gradients until it is done, and with one before it (2.7 µs a call)
compiled autograd fails where a result of the graph is not used (torch 2.13).

Not covered, so that the error is torch's: graphs without a result that has a gradient, which only
write to their inputs. Compiled autograd refuses create_graph itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bla_inductor.errors import BlaDoubleBackwardError
from bla_inductor.report import Report

__all__ = ["refused"]

Compiled = Callable[..., Any]


def refused(compiled: Compiled, example_inputs: Sequence[Any], report: Report) -> Compiled:
    """`compiled`, what AOTAutograd made of a graph, with our error for its second derivative.

    It is `compiled` itself where nothing was rewritten or has a gradient. Dynamo guards on that, so
    that a call with gradients never comes to what was compiled without.
    """
    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    if not (report.matches and differentiable and torch.is_grad_enabled()):
        return compiled
    found = False

    @functools.wraps(compiled)
    def call(*inputs: Any) -> Any:
        nonlocal found
        results = compiled(*inputs)
        if not found:  # only its results lead to the Function
            known = set(_functions(inputs))
            listed = results if isinstance(results, tuple | list) else (results,)
            for function in _functions(listed):
                if function not in known:  # an input may be returned, and come from another graph
                    found = True
                    _tell(function, report)
                    break
        return results

    return call


def _functions(tensors: Sequence[Any]) -> Iterator[Any]:
    """AOTAutograd's Functions that have made them. Views are made anew, outside of one."""
    for x in (*tensors, *(getattr(x, "_base", None) for x in tensors)):
        function = getattr(getattr(x, "grad_fn", None), "_forward_cls", None)
        if _of_aot_autograd(function):
            yield function


def _tell(function: Any, report: Report) -> None:
    """In place: what the backward of `function` records raises our error."""
    backward = function.backward

    def second(grads: Any) -> None:
        raise BlaDoubleBackwardError(report)

    def first(ctx: Any, *grads: Any) -> Any:
        results = backward(ctx, *grads)
        if torch.is_grad_enabled():
            _before_recorded(results, second)
        return results

    function.backward = staticmethod(first)


def _before_recorded(results: Iterable[Any], hook: Callable[[Any], None]) -> None:
    nodes: set[Any] = {getattr(x, "grad_fn", None) for x in results}
    for node in nodes:
        if _of_aot_autograd(getattr(node, "_forward_cls", None)):
            node.register_prehook(hook)


def _of_aot_autograd(function: Any) -> bool:
    return hasattr(function, "_aot_id")
