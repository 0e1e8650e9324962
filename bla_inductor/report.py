"""What was matched, what was refused, and why: the one thing the user reads.

A `Match` is a place in the user's code that was replaced, a `Refusal` one that looked like a family
but was left as it was. Both name the user's own source line. `Report` collects them over the graphs
of a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

__all__ = ["Location", "Match", "Refusal", "Report", "locate"]

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n?(?P<code>[^\n]*)'
)
_WRAPPER = re.compile(r"[/\\]bla_inductor[/\\]explainer\.py$")  # the frame that calls the model
_LIBRARIES = re.compile(r"[/\\]site-packages[/\\](torch|einops)[/\\]|[/\\]torch[/\\]_dynamo[/\\]")


@dataclass(frozen=True, slots=True)
class Location:
    """A line of the user's code: file, line, the enclosing function and the text of the line."""

    file: str
    line: int
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def locate(node: fx.Node) -> Location:
    """The innermost line of the user's code (not of torch or einops) that made `node`.

    Line 0 where no line is known: torch keeps none of functions that exec made.
    """
    frames = [
        Location(m["file"], int(m["line"]), m["function"], m["code"].strip())
        for m in _FRAME.finditer(node.meta.get("stack_trace") or "")
        if not _WRAPPER.search(m["file"])
    ]
    own = [f for f in frames if not _LIBRARIES.search(f.file)]
    if own or frames:
        return (own or frames)[-1]
    return Location(f"graph node {node.name}", 0)


@dataclass(frozen=True, slots=True)
class Match:
    """A place that was rewritten.

    family: the pattern's name; formula: what it computes, in index notation; sizes: `B=2 H=8 N=1024
    …`;
    feature_maps: what q and k are of the tensors before them; dtype: of the operands and of the
    result; reason: why the rewrite pays; node: the graph node replaced; approximate: how its
    results differ from the user's, empty where they do not.
    """

    family: str
    formula: str
    sizes: str
    dtype: str
    location: Location
    reason: str = ""
    node: str = ""
    feature_maps: str = ""
    approximate: str = ""

    def __str__(self) -> str:
        lines = [f"matched  {self.location}  {self.family}"]
        if self.location.code:
            lines.append(f"    code     {self.location.code}")
        lines.append(f"    formula  {self.formula}")
        if self.feature_maps:
            lines.append(f"    φ        {self.feature_maps}")
        lines.append(f"    sizes    {self.sizes}  {self.dtype}")
        if self.reason:
            lines.append(f"    why      {self.reason}")
        if self.approximate:
            lines.append(f"    NOTE     {self.approximate}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place that was left as the user wrote it, and the reason in words a user can act on."""

    family: str
    reason: str
    location: Location
    node: str = ""

    def __str__(self) -> str:
        lines = [f"refused  {self.location}  {self.family}"]
        if self.location.code:
            lines.append(f"    code     {self.location.code}")
        lines.append(f"    reason   {self.reason}")
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """Everything that was decided about one graph, or, added up with `+`, about all graphs of a
    model.

    `graphs` counts the graphs looked at and `nodes` their nodes; `seconds` is the time the analysis
    took. `rules` counts, for each rule of the algebra, how often it was asked what a tensor is
    (`matmul tried`) and how often it told (`matmul`).
    """

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    graphs: int = 0
    nodes: int = 0
    seconds: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Report) -> Report:
        return Report(
            self.matches + other.matches,
            self.refusals + other.refusals,
            self.graphs + other.graphs,
            self.nodes + other.nodes,
            self.seconds + other.seconds,
            self.rules + other.rules,
        )

    def placed(self, place: Location) -> Report:
        """The same with `place` where no line is known."""

        def told(entry: Any) -> Any:
            return entry if entry.location.line else replace(entry, location=place)

        return replace(
            self, matches=[*map(told, self.matches)], refusals=[*map(told, self.refusals)]
        )

    def __iter__(self) -> Iterator[Match | Refusal]:
        yield from self.matches
        yield from self.refusals

    def summary(self) -> str:
        """One line: how many matches and refusals, in how many graphs, and where the first of them
        is.
        """
        counted = f"{len(self.matches)} matched, {len(self.refusals)} refused"
        if approximate := sum(bool(m.approximate) for m in self.matches):
            counted = f"{len(self.matches)} matched ({approximate} approximate), " + (
                f"{len(self.refusals)} refused"
            )
        text = f"{counted} in {self.graphs} graph{'s' * (self.graphs != 1)} of {self.nodes} nodes"
        if self.matches:
            return f"{text}; first match {self.matches[0].location}"
        if self.refusals:
            first = self.refusals[0]
            return f"{text}; nearest {first.location}: {first.reason}"
        return f"{text}; no product of the form Q(KᵀV) was found"

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self)])
