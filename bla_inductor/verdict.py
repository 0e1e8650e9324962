"""Whether a rewritten graph is as accurate as the user's: the errors, and what is allowed.

    error = ‖result - exact‖ / ‖exact‖        exact: the user's graph in fp64
    error of ours ≤ max(1.1 · error of the original, a few roundings of the dtype)

How far one run is off is chance in part: of few roundings that reach every entry (a mean, a
normaliser), and of few entries. So the factor is 1.1 · (1 + 4 / √entries), results of fewer than
64 entries are allowed a few roundings of the coarsest dtype in the graph, and what exceeds that by
less than ten times is measured on eight inputs: the root mean squares of both errors are compared,
with 1.1 · (1 + 1 / √8 + 4 / √(8 · entries)).

Three more things are not held against a result. The original itself is more than 10 % off: that is
cancellation, and a factor of 10 is allowed. It is zero to rounding beside the other results of its
kind, as the gradient of a bias before a normalisation is: then it is measured by their size. It is
off by less than ten times what is allowed, the rewritten graph run operator by operator is not, and
the original that the inner compiler has compiled is off as much.

Entries where the original or the exact result is not finite are left out; ours has to be finite
everywhere else. Of integers and booleans, the error is the share of entries that differ, and one
in a hundred may: they may come of comparisons of rounded numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bla_inductor.errors import BlaVerificationError
from bla_inductor.report import Location, Report

__all__ = [
    "Comparison",
    "Verification",
    "beside_compiled",
    "coarsest",
    "compare",
    "pooled",
    "told",
]

FACTOR = 1.1
CHANCE = 4.0
FEW = 64  # entries
ROUNDINGS = 8.0
ROUNDINGS_16 = 2.0  # sums of 16-bit numbers are kept in fp32: fewer roundings are left
# Without fp64: how far two ways to compute the same may be apart.
APART = 256.0
APART_16 = 8.0
_NOISE = 0.1
_GROSS = 10.0
_DIFFERING = 0.01


@dataclass(frozen=True, slots=True)
class Comparison:
    """One result of a graph: an output, what an input or a buffer holds afterwards, or a gradient.

    ours, original: relative errors against fp64; without fp64, `original` is None and `ours` is the
    difference from the original. location: the line of the user's code that made it, or, for a
    gradient, that was rewritten. note: what differs where no number tells it, or how often it was
    measured. entries, eps: what `allowed` was reckoned with.
    """

    name: str
    ours: float
    original: float | None
    allowed: float
    location: Location | None = None
    note: str = ""
    entries: int = 0
    eps: float = 0.0

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed

    @property
    def doubtful(self) -> bool:
        """Not ok, but not by so much that it could not be chance."""
        return not self.ok and self.original is not None and self.ours <= _GROSS * self.allowed

    def __str__(self) -> str:
        known = "      –" if self.original is None else f"{self.original:7.1e}"
        line = (
            f"{'ok    ' if self.ok else 'BREACH'}  {self.ours:7.1e}  {known}  {self.allowed:7.1e}"
        )
        where = f"  ({self.location})" if self.location is not None and not self.ok else ""
        return f"{line}  {self.name}{where}{f': {self.note}' if self.note else ''}"


@dataclass(slots=True)
class Verification:
    """What was compared, over all graphs in which something was rewritten.

    calls: of such graphs; from the second on, its number is in the names of the results. notes:
    what could not be compared, or not with fp64, and why. report: what was rewritten.
    script: a program that shows a breach by itself, where there was one.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    notes: list[str] = field(default_factory=list)
    script: Path | None = None
    calls: int = 0

    @property
    def ok(self) -> bool:
        """Nothing that was compared is less accurate than allowed. See `notes` for what was not."""
        return not self.breaches

    @property
    def breaches(self) -> list[Comparison]:
        """Outputs first, which make the gradients wrong as well."""
        return [c for c in self.comparisons if not c.ok]

    def check(self) -> Verification:
        """Itself; raises BlaVerificationError on a breach."""
        if self.breaches:
            raise BlaVerificationError(self)
        return self

    def summary(self) -> str:
        matched = f"{len(self.report.matches)} rewritten"
        if not self.comparisons:
            return f"nothing was compared ({matched})"
        if self.breaches:
            first = self.breaches[0]
            count = f"{len(self.breaches)} of {len(self.comparisons)} results"
            return f"{count} less accurate than allowed ({matched}); {told(first)}"
        n = len(self.comparisons)
        results = f"{n} result{'s' * (n != 1)} as accurate as the original's"
        return f"{results} ({matched})"

    def __str__(self) -> str:
        lines = [self.summary(), *(f"note: {note}" for note in self.notes)]
        if self.comparisons:
            lines += ["        ours     original  allowed  result", *map(str, self.comparisons)]
        if self.script is not None:
            lines.append(f"to reproduce it: python {self.script}")
        return "\n".join(lines)


def told(c: Comparison) -> str:
    """One breach in words."""
    if c.note and math.isinf(c.ours):
        return f"{c.name}: {c.note}"
    allowed = f"allowed {c.allowed:.1e}"
    if c.original is None:
        return f"{c.name} is {c.ours:.1e} from the original, {allowed}"
    return f"{c.name} is {c.ours:.1e} from fp64, the original {c.original:.1e}, {allowed}"


def coarsest(tensors: Iterable[Any]) -> float:
    """The largest eps of the floating-point dtypes among `tensors` of 16 bits and more."""
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor) and _inexact(x)}
    return max((torch.finfo(d).eps for d in dtypes if d.itemsize > 1), default=0.0)


def compare(
    names: Sequence[str],
    locations: Sequence[Location | None],
    ours: Sequence[Any],
    original: Sequence[Any],
    exact: Sequence[Any] | None,
    eps: float,
) -> list[Comparison]:
    """Results of one kind, side by side; eps: `coarsest` of the graph; exact: None without fp64."""
    truth = original if exact is None else exact
    pool = _size([x for x in truth if isinstance(x, Tensor) and _inexact(x)])
    return [
        _compare(name, place, a, b, None if exact is None else c, eps, pool)
        for name, place, a, b, c in zip(names, locations, ours, original, truth, strict=True)
    ]


def _compare(
    name: str,
    location: Location | None,
    ours: Any,
    original: Any,
    exact: Any,
    eps: float,
    pool: float,
) -> Comparison:
    def differs(note: str) -> Comparison:
        return Comparison(name, math.inf, None, 0.0, location, note)

    if not isinstance(original, Tensor):
        same = type(ours) is type(original) and bool(ours == original)
        return (
            Comparison(name, 0.0, 0.0, 0.0, location)
            if same
            else differs(f"{ours!r}, the original gives {original!r}")
        )
    if not isinstance(ours, Tensor):
        return differs(f"{ours!r} instead of a tensor")
    for what in ("shape", "dtype", "device"):
        a, b = getattr(ours, what), getattr(original, what)
        if a != b:
            return differs(f"{what} {a}, the original's is {b}")
    if original.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, location)
    if not _inexact(original):
        theirs = 0.0 if exact is None else _share(original, exact)
        mine = _share(ours, original if exact is None else exact)
        share = max(FACTOR * theirs, _DIFFERING)
        return Comparison(name, mine, None if exact is None else theirs, share, location)
    truth = (original if exact is None else exact).to(_wide(original.dtype))
    where = truth.isfinite() & original.isfinite()
    count = max(int(where.sum()), 1)
    own = torch.finfo(original.dtype).eps
    eps = max(own, eps) if count < FEW else own
    size = _norm(torch.where(where, truth, 0))
    if size <= eps * pool * math.sqrt(count):
        size = pool * math.sqrt(count)
    mine = _error(ours, truth, where, size)
    if exact is None:
        apart = APART_16 if _narrow(eps) else APART
        return Comparison(name, mine, None, apart * eps, location)
    theirs = _error(original, truth, where, size)
    limit = _allowed(theirs, count, eps, 1)
    note = "the original has lost its digits: hardly judged" if theirs > _NOISE else ""
    return Comparison(name, mine, theirs, limit, location, note, count, eps)


def _allowed(original: float, entries: int, eps: float, draws: int) -> float:
    floor = (ROUNDINGS_16 if _narrow(eps) else ROUNDINGS) * eps
    if original > _NOISE:
        return _GROSS * original
    chance = CHANCE / math.sqrt(draws * entries) + (draws > 1) / math.sqrt(draws)
    return max(FACTOR * (1 + chance) * original, floor)


def pooled(draws: Sequence[Sequence[Comparison]]) -> list[Comparison]:
    """The same results on several inputs: root mean squares of the errors, judged as such.

    Those that were ok or not doubtful on the first are left as they were.
    """
    found = []
    for rows in zip(*draws, strict=True):
        first = rows[0]
        if first.doubtful:
            ours = _mean_square([row.ours for row in rows])
            theirs = _mean_square([row.original or 0.0 for row in rows])
            limit = _allowed(theirs, first.entries, first.eps, len(rows))
            note = f"over {len(rows)} inputs"
            first = replace(first, ours=ours, original=theirs, allowed=limit, note=note)
        found.append(first)
    return found


def beside_compiled(
    rows: Sequence[Comparison], compiled: Sequence[Sequence[Comparison]], compiler: str
) -> list[Comparison]:
    """`rows`, where a doubtful one may be as far off as the original is that `compiler` compiles.

    compiled: the results of that, for each of the inputs that `rows` are of.
    """
    found = []
    for row in rows:
        errors = [other.ours for draw in compiled for other in draw if other.name == row.name]
        if row.doubtful and errors:
            theirs = _mean_square(errors)
            limit = _allowed(theirs, row.entries, row.eps, len(errors))
            if row.ours <= limit:
                note = f"{compiler} alone, without bla, is {theirs:.1e} from fp64"
                row = replace(row, allowed=limit, note=note)
        found.append(row)
    return found


def _mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _narrow(eps: float) -> bool:
    return eps > torch.finfo(torch.float32).eps


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _error(got: Tensor, truth: Tensor, where: Tensor, size: float) -> float:
    off = _norm(torch.where(where, got.to(truth.dtype) - truth, 0))
    if off == 0:
        return 0.0
    return off / size if math.isfinite(off) and size > 0 else math.inf


def _norm(x: Tensor) -> float:
    """∞ where an entry is not finite."""
    value = torch.linalg.vector_norm(x).item()
    return value if math.isfinite(value) else math.inf


def _share(a: Tensor, b: Tensor) -> float:
    return (a != b).double().mean().item()


def _size(tensors: Sequence[Tensor]) -> float:
    """The root mean square of all finite entries."""
    total, count = 0.0, 0
    for x in tensors:
        finite = torch.where(x.isfinite(), x, 0).to(_wide(x.dtype))
        total += _norm(finite) ** 2
        count += x.numel()
    return math.sqrt(total / count) if count and math.isfinite(total) else 0.0
