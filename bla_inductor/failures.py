"""What a user is told when bla itself fails: one warning, and the compilation goes on."""

from __future__ import annotations

import logging
import pathlib
import traceback

__all__ = ["forget", "warn_once"]

_PACKAGE = pathlib.Path(__file__).parent
_OURS = (_PACKAGE, _PACKAGE.parent / "patterns", _PACKAGE.parent / "kernels")
_told: set[tuple[str, str]] = set()


def warn_once(log: logging.Logger, consequence: str, error: BaseException) -> None:
    """Warn that bla failed, `so <consequence>`: the exception, where, and what to do.

    Once for each cause until `forget()`; the traceback goes to the debug level every time.
    """
    cause = f"{type(error).__name__}: {error}"
    place = _where(error)
    log.debug("a failure of bla", exc_info=error)
    if (cause, place) in _told:
        return
    _told.add((cause, place))
    log.warning(
        "bla failed%s, so %s: %s. Results are not affected. Please report it, with the output of "
        "TORCH_LOGS='+bla_inductor'; options={'rewrite': 'off'} does without the analysis.",
        place,
        consequence,
        cause,
    )


def forget() -> None:
    """Warn again of what was warned of before."""
    _told.clear()


def _where(error: BaseException) -> str:
    """The innermost line of bla's that the exception passed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        if any(path.is_relative_to(root) for root in _OURS):
            return f" at {path.parent.name}/{path.name}:{frame.lineno} ({frame.name})"
    return ""
