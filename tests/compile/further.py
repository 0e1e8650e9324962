"""The second table of spellings: rows that are matched and run, but not compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.compile.spellings import BHND, Shape

__all__ = ["FURTHER", "NEAR_MISSES", "Further", "further", "near_miss"]


@dataclass(frozen=True)
class Further:
    """A spelling whose rewritten graph runs eagerly, so that a row costs a fifth of a second.

    normalised: whether the match has its divisor; decoupled: whether that reads other queries or
    keys than the numerator; reason: part of a refusal that the report has beside the matches;
    lengths: whether it takes another number of tokens.
    """

    function: Callable[..., Any]
    shapes: tuple[Shape, ...] = (BHND, BHND, BHND)
    matches: int = 1
    normalised: bool = False
    decoupled: bool = False
    reason: str = ""
    lengths: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


FURTHER: list[Further] = []
NEAR_MISSES: list[Further] = []


def further(*shapes: Shape, **expected: Any) -> Callable[[Any], Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        FURTHER.append(Further(function, shapes or (BHND,) * 3, **expected))
        return function

    return add


def near_miss(reason: str, *shapes: Shape) -> Callable[[Any], Any]:
    """No match, and `reason` in the report."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append(Further(function, shapes or (BHND,) * 3, 0, reason=reason))
        return function

    return add
