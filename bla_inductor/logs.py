"""What a compilation says of itself: counters, log lines, and an artifact for tlparse.

    TORCH_LOGS="bla_inductor"       one line a graph: what matched, or that nothing did and why
    TORCH_LOGS="+bla_inductor"      the whole report of every graph
    TORCH_TRACE=/tmp/t; tlparse     the whole report, beside Inductor's own artifacts
    torch._dynamo.utils.counters["bla"]    graphs, matched, refused, "rule:matmul" and the like

Without TORCH_LOGS, warnings alone are shown, as with torch's own loggers.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from torch._dynamo.utils import counters
from torch._logging import trace_structured

if TYPE_CHECKING:
    from bla_inductor.report import Report

log = logging.getLogger(__name__)


def announce(report: Report) -> None:
    """Publish the report of one compiled graph."""
    count = counters["bla"]
    count["graphs"] += 1
    count["matched"] += len(report.matches)
    count["refused"] += len(report.refusals)
    count.update({f"rule:{name}": times for name, times in report.rules.items()})
    log.info("%s", report.summary())
    approximate = [m for m in report.matches if m.approximate]
    for match, times in Counter((m.location, m.family, m.approximate) for m in approximate).items():
        log.warning("%s  %s: %s (%d×)", *match, times)  # asked for, but never silent
    if details := "\n".join(map(str, report)):
        log.debug("%s", details)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "bla_report", "encoding": "string"},
        payload_fn=lambda: str(report),
    )
