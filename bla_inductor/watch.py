"""What looks on while a graph is compiled: `debug` writes it down, `verify` keeps the original.

Neither may cost the compilation: a failure here is one warning, and with `strict` it is raised
where it leaves the graph unverified.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import fx

from bla_inductor import failures
from bla_inductor.debugger import recorder
from bla_inductor.options import Options
from bla_inductor.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bla_inductor.examination import Graphs

__all__ = ["Watch"]

log = logging.getLogger(__name__)


class Watch:
    """Made before the rewrite, which is in place; told of it before the inner compiler, which may
    change the graph further.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        for_inductor: Mapping[str, Any],
    ) -> None:
        self.options = options
        self.recorder = recorder(gm, example_inputs)
        self.graphs: Graphs | None = None
        if options.verify is not None:
            with self._guarded():
                from bla_inductor.examination import Graphs

                self.graphs = Graphs.of(gm, options, for_inductor)

    def rewritten(self, gm: fx.GraphModule, report: Report) -> None:
        if self.recorder is not None:
            self.recorder.rewritten(gm, report, self.options)
        if self.graphs is not None:
            graphs, self.graphs = self.graphs, None
            with self._guarded():
                graphs.rewrite_done(gm, report)
                self.graphs = graphs

    def verified(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, or what verifies it on its calls."""
        if self.graphs is None:
            return compiled
        from bla_inductor.verifier import verified

        return verified(self.graphs, compiled)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.options.strict:
                raise
            failures.warn_once(log, "this graph is not verified", error)
