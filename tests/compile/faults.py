"""The operator made wrong on purpose: what verification exists to notice."""

from __future__ import annotations

from typing import Any
from unittest import mock

from bla_inductor.ops import aten

RESULTS, GRADIENTS = "forward", "backward"


def operator_off_by(factor: float, what: str) -> Any:
    """A context in which the first result (the output; dq) is `factor` times what it should be."""
    right = getattr(aten, what)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        first, *others = right(*args, **kwargs)
        return (first * factor, *others)

    return mock.patch.object(aten, what, wrong)


def operator_raising() -> Any:
    """A context in which the operator raises."""
    return mock.patch.object(aten, RESULTS, side_effect=RuntimeError("no such kernel"))
