"""Contractions declared in index notation, and their match against a Term.

`Contraction("q: n c, k: m c, v: m d -> n d")` says which operand carries which letter. A letter is
recognised by
the company it keeps: `c` is summed and occurs in q and k alone, `d` survives and occurs in v alone.
One letter may stand for several indices (image rows and columns, say), and any surviving index that
several operands, or the wrong single one, carry is a batch index. Sizes play no part.

Factors beyond the declared operands join the operand whose letters cover theirs (a key weight joins
k), or stay outside when the result's letters cover them (a gate on the output). Where several would
do, the one with which the factor already is a tensor of the graph (`known`) is taken. A divisor may
be the normaliser although somebody divided an operand by it, so that is a second reading.

An operand may be an outer product, x[n,i]·x[n,j], whose indices no factor has all: then it is a
product that is a tensor of the graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bla_inductor.algebra import Factor, Guard, Index, Mask, Read, Term

__all__ = ["Contraction", "Known", "Roles", "Unsplittable"]


Known = Callable[[tuple[Factor, ...]], bool]


@dataclass(frozen=True, slots=True)
class Roles:
    """Which factors play which operand, and which indices each letter stands for.

    outer: factors that the result's letters cover; they multiply the result.
    """

    operands: dict[str, tuple[Factor, ...]]
    letters: dict[str, tuple[Index, ...]]
    batch: tuple[Index, ...]
    outer: tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Unsplittable:
    """The operands are there, but `factor` couples letters that no operand has together.

    beside: the other factors; keys: the indices of m.
    """

    factor: Factor
    letters: tuple[str, ...]
    beside: tuple[Factor, ...]
    keys: tuple[Index, ...]


@dataclass(frozen=True)
class Contraction:
    """A product of named operands in index notation, `name: letters, … -> letters`."""

    text: str
    operands: dict[str, str] = field(init=False)
    result: str = field(init=False)

    def __post_init__(self) -> None:
        left, _, right = self.text.partition("->")
        pairs = re.findall(r"(\w+):([\w\s]+)", left)
        object.__setattr__(
            self, "operands", {name: letters.replace(" ", "") for name, letters in pairs}
        )
        object.__setattr__(self, "result", right.replace(" ", ""))

    def solve(self, term: Term, known: Known) -> Iterator[Roles | Unsplittable]:
        """All ways in which `term` is this contraction."""
        reads = [f for f in term.factors if isinstance(f, Read) and f.power == 1]
        if len(reads) < len(self.operands) or not term.bound:
            return
        single: list[tuple[Read, ...]] = [(read,) for read in reads]
        found = list(self._readings(term, single, known))
        if all(isinstance(r, Unsplittable) for r in found) and len(reads) > len(self.operands):
            outer = [p for size in (2, 3) for p in itertools.combinations(reads, size) if known(p)]
            found += self._readings(term, single + outer, known) if outer else []
        yield from sorted(found, key=lambda roles: isinstance(roles, Unsplittable))

    def _readings(
        self, term: Term, cores: list[tuple[Read, ...]], known: Known
    ) -> Iterator[Roles | Unsplittable]:
        """The ways with one of `cores` for each operand."""
        bound = frozenset(term.bound)
        where = {core: frozenset[Index]().union(*(r.indices() for r in core)) for core in cores}
        for chosen in itertools.permutations(cores, len(self.operands)):
            taken = [id(read) for core in chosen for read in core]
            if len(set(taken)) < len(taken):
                continue
            letters = self._letters(
                {n: where[core] for n, core in zip(self.operands, chosen, strict=True)}, bound
            )
            if letters is None:
                continue
            rest = [f for f in term.factors if id(f) not in taken]
            for divided in (False, True):
                core = dict(zip(self.operands, chosen, strict=True))
                roles = self._assign(core, letters, rest, known, divided)
                yield roles
                if isinstance(roles, Unsplittable) or not any(map(_divisor, rest)):
                    break

    def _letters(
        self, carried: dict[str, frozenset[Index]], bound: frozenset[Index]
    ) -> dict[str, tuple[Index, ...]] | None:
        """The indices of each letter; "" collects the batch. None when a summed index fits no
        letter.
        """
        company = {
            (
                frozenset(n for n, ls in self.operands.items() if letter in ls),
                letter in self.result,
            ): letter
            for letter in dict.fromkeys("".join(self.operands.values()))
        }
        found: dict[str, list[Index]] = {letter: [] for letter in [*company.values(), ""]}
        everything = frozenset().union(*carried.values())
        if not bound <= everything:
            return None
        for index in sorted(everything, key=lambda i: i.number):
            key = (
                frozenset(n for n, indices in carried.items() if index in indices),
                index not in bound,
            )
            letter = company.get(key)
            if letter is None and index in bound:
                return None
            found[letter or ""].append(index)
        if not all(found[letter] for letter in company.values()):
            return None
        return {letter: tuple(indices) for letter, indices in found.items()}

    def _assign(
        self,
        core: dict[str, tuple[Read, ...]],
        letters: dict[str, tuple[Index, ...]],
        rest: list[Factor],
        known: Known,
        divided: bool,
    ) -> Roles | Unsplittable:
        batch = list(letters[""])
        carried = {i for indices in letters.values() for i in indices}
        for factor in rest:  # an index that only extra factors carry is a batch index too
            batch += sorted(factor.indices() - carried - set(batch), key=lambda i: i.number)
        free = frozenset(batch)
        groups: dict[str, list[Factor]] = {name: list(reads) for name, reads in core.items()}
        outer: list[Factor] = []
        spans = {n: free.union(*(letters[x] for x in ls)) for n, ls in self.operands.items()}
        result = free.union(*(letters[x] for x in self.result))
        homes: list[tuple[Factor, list[str]]] = []
        for factor in rest:
            fitting = [n for n, span in spans.items() if factor.indices() <= span]
            if not fitting and not factor.indices() <= result:
                coupled = tuple(
                    x for x, found in letters.items() if x and factor.indices() & set(found)
                )
                beside = (*itertools.chain(*core.values()), *(f for f in rest if f is not factor))
                return Unsplittable(factor, coupled, beside, letters.get("m", ()))
            if divided and _divisor(factor) and factor.indices() <= result:
                outer.append(factor)
            else:
                homes.append((factor, fitting))
        while homes:
            taken, home = _joined(homes, groups, known)
            homes = [h for h in homes if all(h is not t for t in taken)]
            for factor, fitting in taken:
                if home:
                    groups[home].append(factor)
                elif factor.indices() <= result:
                    outer.append(factor)
                else:  # what a mask clears in the state (of c, say) was cleared of keys and values
                    keys = isinstance(factor, Mask) and "k" in fitting
                    groups["k" if keys else fitting[0]].append(factor)
        operands = {name: tuple(factors) for name, factors in groups.items()}
        return Roles(operands, {x: i for x, i in letters.items() if x}, tuple(batch), tuple(outer))


def _joined(
    homes: list[tuple[Factor, list[str]]], groups: dict[str, list[Factor]], known: Known
) -> tuple[Sequence[tuple[Factor, list[str]]], str]:
    """The factors that make a tensor of the graph with an operand that they fit, and the operand;
    the first of them, and "", where none do. A ratio may be no tensor but with what it multiplies.
    """
    for size in range(1, len(homes) + 1):
        for chosen in itertools.combinations(homes, size):
            for name, group in groups.items():
                fits = all(name in fitting for _, fitting in chosen)
                if fits and known((*group, *(factor for factor, _ in chosen))):
                    return chosen, name
    return homes[:1], ""


def _divisor(factor: Factor) -> bool:
    return isinstance(factor, Guard) and factor.power == -1
