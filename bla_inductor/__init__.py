"""`torch.compile(model, backend="bla")`: linear attention found in the user's code, and fused.

Nothing here has to be imported to use the backend: torch finds `bla` by its entry point. What the
package offers besides is loaded on first use, because torch itself imports this file while it
starts whenever TORCH_LOGS names `bla_inductor`.

    explain(model, *args, **kwargs)   what would be rewritten, and what not and why: a Report
    verify(model, *args, **kwargs)    how accurate what is rewritten is, against fp64
    debug(folder)                     a context: writes down all that is compiled in it
    rewrite_exported(program)         the same rewriting for a program of torch.export
    Report, Match, Refusal            what `explain` returns and what the log prints
    Options                           the backend's options, their defaults and BLA_* variables
    Verification, Comparison          what `verify` returns
    BlaOptionError, BlaNoMatchError   what a compilation may raise: see `bla_inductor.errors`
    BlaVerificationError              what a verified call may raise
    BlaDoubleBackwardError            what a second derivative raises in a compiled graph
"""

import importlib
from typing import TYPE_CHECKING, Any

from bla_inductor._version import __version__

if TYPE_CHECKING:
    from bla_inductor.debugger import debug
    from bla_inductor.errors import (
        BlaDoubleBackwardError,
        BlaError,
        BlaNoMatchError,
        BlaOptionError,
        BlaVerificationError,
    )
    from bla_inductor.explainer import explain
    from bla_inductor.exported import rewrite_exported
    from bla_inductor.options import Options
    from bla_inductor.report import Match, Refusal, Report
    from bla_inductor.verdict import Comparison, Verification
    from bla_inductor.verifier import verify

__all__ = [
    "BlaDoubleBackwardError",
    "BlaError",
    "BlaNoMatchError",
    "BlaOptionError",
    "BlaVerificationError",
    "Comparison",
    "Match",
    "Options",
    "Refusal",
    "Report",
    "Verification",
    "__version__",
    "debug",
    "explain",
    "rewrite_exported",
    "verify",
]

_HOME = {
    "BlaDoubleBackwardError": "errors",
    "BlaError": "errors",
    "BlaNoMatchError": "errors",
    "BlaOptionError": "errors",
    "BlaVerificationError": "errors",
    "Comparison": "verdict",
    "Match": "report",
    "Options": "options",
    "Refusal": "report",
    "Report": "report",
    "Verification": "verdict",
    "debug": "debugger",
    "explain": "explainer",
    "rewrite_exported": "exported",
    "verify": "verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
