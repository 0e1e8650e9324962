"""Compiled code drops the tangents of torch.autograd.forward_ad: it gives the value, and no
derivative, without a word. So in there graphs run as they were written, uncompiled.
"""

from __future__ import annotations

import logging

from torch import fx
from torch.autograd import forward_ad

from bla_inductor import compat
from bla_inductor.patterns import FAMILY
from bla_inductor.report import Refusal, Report, locate

__all__ = ["refused"]

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
