"""`python -m bla_inductor doctor`: what is here, what runs where, how exact it is, what is wrong.

Sections of findings, one after the other. A problem says what to do; a section that fails is a
problem itself. The exit status is 1 if there is one. It needs neither a GPU nor Triton, and says
what torch's absence means too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Finding", "note", "ok", "problem", "run"]


@dataclass(frozen=True, slots=True)
class Finding:
    """level: "ok", "note" (worth knowing) or "problem"; todo: what to do about it."""

    level: str
    text: str
    todo: str = ""

    def __str__(self) -> str:
        lines = [f"  {self.level:8}{self.text}"]
        if self.todo:
            lines.append(f"          -> {self.todo}")
        return "\n".join(lines)


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str, todo: str = "") -> Finding:
    return Finding("note", text, todo)


def problem(text: str, todo: str) -> Finding:
    return Finding("problem", text, todo)


Section = Callable[[], Iterator[Finding]]


def sections() -> dict[str, Section]:
    """In the order in which they are printed."""
    from bla_inductor import doctor_machine as machine

    return {
        "Versions": machine.versions,
        "Devices": machine.devices,
        "Settings": machine.settings,
        "Caches": machine.caches,
        "What runs": _kernels,
        "Self-test, ‖ours - fp64‖ / ‖fp64‖": _errors,
    }


def _kernels() -> Iterator[Finding]:
    from bla_inductor import doctor_selftest  # it imports torch

    yield from doctor_selftest.kernels()


def _errors() -> Iterator[Finding]:
    from bla_inductor import doctor_machine as machine

    if any(f.level == "problem" for f in (*machine.settings(), *machine.caches())):
        yield note("not run: nothing can be told of it while the settings above are wrong")
        return
    from bla_inductor import doctor_selftest

    yield from doctor_selftest.errors()


def run() -> int:
    """Print all sections; 1 if there is a problem, else 0."""
    problems: list[Finding] = []
    for title, section in sections().items():
        print(title, flush=True)
        for finding in _guarded(section):
            print(finding, flush=True)
            problems += [finding] if finding.level == "problem" else []
    if not problems:
        print("\nHealthy.")
        return 0
    print(f"\n{len(problems)} problem{'s' * (len(problems) > 1)}:")
    for finding in problems:
        print(finding)
    return 1


def _guarded(section: Section) -> Iterator[Finding]:
    try:
        yield from section()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torch":
            yield note("not looked at: there is no torch")
        else:
            yield _broken(error)
    except Exception as error:
        yield _broken(error)


def _broken(error: Exception) -> Finding:
    line = str(error).strip().partition("\n")[0]
    return problem(
        f"looking failed: {type(error).__name__}: {line}",
        "see what the line says; if it is no fault of this machine, please report it",
    )
