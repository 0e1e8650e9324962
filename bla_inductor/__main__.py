"""The command line.

    python -m bla_inductor explain module:callable
    python -m bla_inductor bench SUITE
    python -m bla_inductor doctor

explain: `callable` takes no arguments and returns what to explain: a tuple `(model, *args)`, or
`(model, args, kwargs)` with a tuple and a dictionary. A file may stand for the module
(`path/to/file.py:callable`).

bench: times against the memory floor and against Inductor, as CSV and plots; see
bla_inductor/bench/cases.py for the suites.

doctor: what is installed, what runs on this machine, how exact it is, and what is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 1 where `explain` found nothing to rewrite, and where
    `doctor` found something wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m bla_inductor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what a compilation would rewrite, and why not")
    explain.add_argument("target", metavar="module:callable")
    # Only when it is asked for: the benchmark imports torch, an error message need not wait for it.
    words = sys.argv[1:] if arguments is None else arguments
    bench = commands.add_parser("bench", help="times against the memory floor and Inductor")
    if "bench" in words[:1]:
        from bla_inductor.bench import command

        command.add_arguments(bench)
    commands.add_parser("doctor", help="versions, devices, caches, a self-test")
    given = parser.parse_args(arguments)
    try:
        if given.command == "bench":
            return command.run(given)
        if given.command == "doctor":
            from bla_inductor import doctor

            return doctor.run()
        return _explain(given.target)
    except UsageError as error:
        parser.error(str(error))


class UsageError(Exception):
    """The command was given something that it cannot use; the text says what it takes."""


def _explain(target: str) -> int:
    from bla_inductor.explainer import explain

    model, args, kwargs = _unpacked(target, _load(target)())
    report = explain(model, *args, **kwargs)
    print(report)
    return 0 if report.matches else 1


def _load(target: str) -> Callable[[], Any]:
    name, _, attribute = target.rpartition(":")
    if not name or not attribute:
        raise UsageError(f"{target!r} should be module:callable, such as my_model:example")
    try:
        module = _file(Path(name)) if name.endswith(".py") else _module(name)
    except (ImportError, FileNotFoundError) as error:
        raise UsageError(f"cannot import {name!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"{name} has no callable {attribute!r}; it has {', '.join(names[:12])}")
    return function


def _module(name: str) -> Any:
    sys.path.insert(0, "")
    return importlib.import_module(name)


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _unpacked(
    target: str, made: Any
) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """(model, *args), or (model, args, kwargs) where the last two are a tuple and a dictionary."""
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise UsageError(
            f"{target} returned a {type(made).__name__}; it should return (model, *args) or "
            "(model, args, kwargs)"
        )
    model, *rest = made
    if len(rest) == 2 and isinstance(rest[0], tuple | list) and isinstance(rest[1], Mapping):
        return model, rest[0], rest[1]
    return model, rest, {}


if __name__ == "__main__":
    sys.exit(main())
