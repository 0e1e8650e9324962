"""What Inductor makes of the operators on CUDA: templates of the kernels, or a call.

A template's result is read by the epilogue of its own kernel, and a launch costs the host what a
launch of any of Inductor's kernels costs. A call of the operator goes through torch's dispatcher
and Triton's launcher; it is the way for everything that the templates do not cover, and for
whatever goes wrong with them.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bla_inductor.ops.packed import linear_attention_backward_packed, written_into
from bla_inductor.ops.schema import Inputs, gradients
from bla_inductor.templates import Unsupported

__all__ = ["OPERATORS", "calls_only", "lowering"]

log = logging.getLogger(__name__)

bla = torch.ops.bla
_reported: set[str] = set()
_calls = contextvars.ContextVar("calls", default=False)


def lowering(operator: Any) -> Callable[..., Any]:
    """The function for `register_lowering(operator)`. It raises nothing that the call does not."""
    from torch._inductor.lowering import fallback_handler

    call = fallback_handler(operator, add_to_fallback_set=False)

    def lower(*args: Any, **kwargs: Any) -> Any:
        if _calls.get() or args[0].get_device().type != "cuda":
            return call(*args, **kwargs)
        try:
            return _BUILD[operator](*args, **kwargs)
        except Exception as error:
            _report(operator, error)
            return call(*args, **kwargs)

    return lower


@contextmanager
def calls_only() -> Iterator[None]:
    """Inside, every operator is lowered to a call."""
    token = _calls.set(True)
    try:
        yield
    finally:
        _calls.reset(token)


def _report(operator: Any, error: Exception) -> None:
    """Once for each reason: INFO where the templates end, a warning where they failed."""
    reason = f"{operator}: {type(error).__name__}: {error}"
    if reason in _reported:
        return
    _reported.add(reason)
    if isinstance(error, Unsupported):
        log.info("%s%s is called instead of fused: %s", operator, _place(), error)
        return
    log.warning(
        "%s%s is called instead of fused, which changes no result, because its lowering failed: "
        "%s: %s. Please report it, with the output of TORCH_LOGS='+bla_inductor'.",
        operator,
        _place(),
        type(error).__name__,
        error,
    )
    log.debug("the failure of the lowering", exc_info=error)


def _place() -> str:
    """Where the user wrote what is being lowered."""
    from torch._inductor.virtualized import V

    trace = str(V.graph.current_node.meta.get("stack_trace") or "")
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return f" ({places[-1]})" if places else ""


def _attention(*args: Any, **kwargs: Any) -> Any:
    return _forward(*args, **kwargs)[0]


def _forward(*args: Any, **kwargs: Any) -> Any:
    from bla_inductor.templates.forward import forward

    return forward(Inputs(*args, **kwargs))


def _backward(*args: Any, **kwargs: Any) -> Any:
    from bla_inductor.templates.backward import backward

    return backward(gradients(*args, **kwargs))


def _backward_packed(*args: Any, size: Any, places: Any, **kwargs: Any) -> Any:
    from bla_inductor.templates.backward import backward

    return backward(gradients(*args, **kwargs), (size, places))


def _written_into(joined: Any, part: Any, dim: int, start: int) -> Any:
    from bla_inductor.templates.joined import write

    return write(joined, part, dim, start)


_BUILD: dict[Any, Callable[..., Any]] = {
    bla.linear_attention.default: _attention,
    bla.linear_attention_forward.default: _forward,
    bla.linear_attention_backward.default: _backward,
    linear_attention_backward_packed: _backward_packed,
    written_into: _written_into,
}
OPERATORS = tuple(_BUILD)
