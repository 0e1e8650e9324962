"""The errors that a compilation with `backend="bla"` raises.

Dynamo shows them as "backend='bla' raised:" and the message, so the first line of each says by
itself what is wrong and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bla_inductor.report import Report
    from bla_inductor.verdict import Verification


_OF_COMPILE = ("backend", "disable", "dynamic", "fullgraph", "recompile_limit")


class BlaError(Exception):
    """Any error of this package that a user can mend."""


class BlaOptionError(BlaError, ValueError):
    """An option that does not exist, or a value that its option does not take.

    `key` is the option or the environment variable, `got` what was given, `valid` what may be
    given instead, `nearest` the likeliest of them or None.
    """

    def __init__(self, message: str, key: str, got: Any, valid: Iterable[str], nearest: str | None):
        super().__init__(message)
        self.key, self.got, self.valid, self.nearest = key, got, tuple(valid), nearest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.key, self.got, self.valid, self.nearest)

    @classmethod
    def unknown_key(
        cls, key: str, got: Any, own: Iterable[str], inductor: Iterable[str]
    ) -> BlaOptionError:
        """`key` is neither one of `own` nor one of Inductor's configuration keys."""
        own = tuple(own)
        valid = (*own, *inductor)
        if key in _OF_COMPILE:
            told = f"{key!r} is no option: it is an argument, torch.compile(model, {key}=…)"
            return cls(told, key, got, valid, None)
        nearest = _nearest(key, valid)
        return cls(
            f"unknown option {key!r}{_suggest(nearest)} bla's own are {', '.join(own)}; "
            "Inductor's are accepted too (torch._inductor.list_options()).",
            key,
            got,
            valid,
            nearest,
        )

    @classmethod
    def no_dictionary(cls, got: Any) -> BlaOptionError:
        """What was given as `options` is none."""
        told = f"options={got!r} should be a dictionary, such as options={{'strict': True}}"
        return cls(told, "options", got, (), None)

    @classmethod
    def bad_value(cls, key: str, got: Any, valid: Iterable[str]) -> BlaOptionError:
        """`key` exists, but takes one of `valid`."""
        valid = tuple(valid)
        one_of = "one of " if len(valid) > 1 else ""
        nearest = _nearest(str(got), valid)
        return cls(
            f"option {key}={got!r} should be {one_of}{', '.join(valid)}{_suggest(nearest)}",
            key,
            got,
            valid,
            nearest,
        )

    @classmethod
    def for_compile(cls, key: str, got: Any, valid: Iterable[str], instead: str) -> BlaOptionError:
        """`key` says how `torch.compile` is to go about it, and was given elsewhere."""
        valid = tuple(valid)
        return cls(
            f"option {key}={got!r} is for torch.compile. {instead} "
            f"Here the options are {', '.join(valid)}.",
            key,
            got,
            valid,
            None,
        )


class BlaNoMatchError(BlaError, RuntimeError):
    """`strict=True`, and a compiled graph holds nothing that was rewritten.

    `report` has every refusal. Dynamo compiles the pieces between graph breaks one by one, and
    `strict` judges each by itself.
    """

    def __init__(self, report: Report):
        super().__init__(
            "strict=True, and nothing in this graph was rewritten "
            f"({report.summary()}). Without strict it compiles as it is.\n"
            "strict judges every compiled graph by itself: with graph breaks, a piece without "
            "attention raises as well, so use it with torch.compile(..., fullgraph=True)."
            + "".join(f"\n{entry}" for entry in report)
        )
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.report,)


class BlaVerificationError(BlaError, RuntimeError):
    """A rewritten graph was less accurate than the user's, or could not be compared with it.

    `verification` has every result with its errors, and the script that reproduces it.
    """

    def __init__(self, verification: Verification):
        super().__init__(
            f"verification: {verification.summary()}.\n"
            "options={'rewrite': 'off'} compiles without rewriting anything. Please report it.\n"
            f"{verification}"
        )
        self.verification = verification

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.verification,)


class BlaDoubleBackwardError(BlaError, RuntimeError):
    """A second derivative through a rewritten graph that AOTAutograd compiled.

    `report` tells what was rewritten in that graph.
    """

    def __init__(self, report: Report):
        place = f"{report.matches[0].location}{' and others' * (len(report.matches) > 1)}"
        remedy = "Compile with options={'inner': 'eager'}"
        if any(match.approximate for match in report.matches):
            remedy += " and without 'approximate', which has none either."
        else:
            remedy += ": the attention is fused there as well, and twice differentiable."
        super().__init__(
            f"a second derivative was asked of the compiled graph with the attention at {place}; "
            f"torch.compile with aot_autograd does not currently support double backward. {remedy}"
        )
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.report,)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _suggest(nearest: str | None) -> str:
    return f"; did you mean {nearest!r}?" if nearest else "."
