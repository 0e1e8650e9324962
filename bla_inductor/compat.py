"""What differs between the versions of torch that bla supports: 2.11 and later. Only this knows."""

from __future__ import annotations

import inspect
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
