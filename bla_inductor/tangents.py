"""Compiled code drops the tangents of torch.autograd.forward_ad: it gives the value, and no
derivative, without a word. So in there graphs run as they were written, uncompiled.

A graph that enters forward mode itself does not tell torch.autograd.forward_ad. Where it runs
uncompiled, an operator that the user called has to ask its operands.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

from bla_inductor import compat
from bla_inductor.patterns import FAMILY
from bla_inductor.report import Refusal, Report, locate

__all__ = ["asked_for", "refused"]

log = logging.getLogger(__name__)

_REASON = (
    "torch.autograd.forward_ad is active, whose tangents compiled code drops: the graph runs "
    "uncompiled in there"
)


def refused(gm: fx.GraphModule) -> Report | None:
    """The report of a graph that is not to be compiled now; else None, and Dynamo will ask again
    when forward mode begins.
    """
    try:
        compat.guard_forward_mode()
    except Exception:
        log.debug("forward mode is not guarded on", exc_info=True)
    if forward_ad._current_level < 0:
        return None
    refusal = Refusal(FAMILY, _REASON, locate(next(iter(gm.graph.nodes))))
    return Report(refusals=[refusal], graphs=1, nodes=len(gm.graph.nodes))


def asked_for(gm: fx.GraphModule) -> None:
    """In place: our operators in graphs that enter forward mode look for tangents."""
    from bla_inductor.ops import forward_mode

    attention: Any = torch.ops.bla.linear_attention
    for module in gm.modules():
        nodes = list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []
        if any("enter_dual_level" in getattr(n.target, "__name__", "") for n in nodes):
            for node in nodes:
                if node.target in (attention, attention.default):
                    node.target = forward_mode.attention
            module.recompile()  # type: ignore[operator]
