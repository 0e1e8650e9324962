"""Our implementations run as they are: Dynamo does not compile them.

Where a compiled function breaks the graph, torch calls an operator's Python implementation with
Dynamo still watching, which would trace into it: a compilation, and a backend's search for
linear attention, of what runs in one kernel, below autograd, of which Dynamo knows nothing.

`torch.compiler.disable` imports torch._dynamo, and costs 0.5 µs a call. To mark the code costs
neither, and holds for everything that is called from there.
"""

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch

__all__ = ["untraced", "untraced_module"]

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """`function`, which Dynamo leaves alone with all that it calls."""
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        strategy = frames._FrameExecStrategy(skip, skip)
        frames.set_code_exec_strategy(function.__code__, strategy)
    except (AttributeError, TypeError):  # a torch that says it otherwise, or has no Dynamo
        pass
    return function


def untraced_module(module: ModuleType) -> None:
    """Every function that `module` defines."""
    for value in vars(module).values():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            untraced(value)
