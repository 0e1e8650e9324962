"""`torch.compile(model, backend="bla")`: linear attention found in the user's code, and fused.

Nothing here has to be imported to use the backend: torch finds `bla` by its entry point. What the
package offers besides is loaded on first use, because torch itself imports this file while it
starts whenever TORCH_LOGS names `bla_inductor`.

    explain(model, *args, **kwargs)   what would be rewritten, and what not and why: a Report
    rewrite_exported(program)         the same rewriting for a program of torch.export
    Report, Match, Refusal            what `explain` returns and what the log prints
    Options                           the backend's options, their defaults and BLA_* variables
    BlaOptionError, BlaNoMatchError   what a compilation may raise: see `bla_inductor.errors`
"""

import importlib
from typing import TYPE_CHECKING, Any

from bla_inductor._version import __version__

if TYPE_CHECKING:
    from bla_inductor.errors import BlaError, BlaNoMatchError, BlaOptionError
    from bla_inductor.explainer import explain
    from bla_inductor.exported import rewrite_exported
    from bla_inductor.options import Options
    from bla_inductor.report import Match, Refusal, Report

__all__ = [
    "BlaError",
    "BlaNoMatchError",
    "BlaOptionError",
    "Match",
    "Options",
    "Refusal",
    "Report",
    "__version__",
    "explain",
    "rewrite_exported",
]

_HOME = {
    "BlaError": "errors",
    "BlaNoMatchError": "errors",
    "BlaOptionError": "errors",
    "Match": "report",
    "Options": "options",
    "Refusal": "report",
    "Report": "report",
    "explain": "explainer",
    "rewrite_exported": "exported",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
