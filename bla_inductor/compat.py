"""What differs between the versions of torch that bla supports: 2.11 and later. Only this knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch


def inference_aware_pass() -> type | None:
    """The class of the passes that Inductor calls as `p(graph, is_inference)`, if it has one."""
    from torch._inductor import custom_graph_pass

    return getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


def isolated() -> dict[str, Any]:
    """Arguments of `torch.compile` that keep its cache entries apart from everybody else's.

    Without it (before 2.13) a compilation counts towards the recompile limit of the functions
    that it meets after a graph break.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def register_decompositions(table: Mapping[Any, Callable[..., Any]]) -> None:
    """Add decompositions of our own operators to Inductor's table.

    Inductor keeps a second table, derived from the first when it is first needed: it is made anew.
    """
    from torch._inductor import decomposition

    for operator, function in table.items():
        decomposition.register_decomposition([operator])(function)
    derived = getattr(decomposition, "fast_random_decomps", None)
    if derived is not None and hasattr(derived, "cache_clear"):
        derived.cache_clear()
