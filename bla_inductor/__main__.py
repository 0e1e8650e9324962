"""The command line.

    python -m bla_inductor explain module:callable
    python -m bla_inductor bench module:callable
    python -m bla_inductor bench SUITE
    python -m bla_inductor doctor

explain, bench: `callable` takes no arguments and returns what to call: a tuple `(model, *args)`, or
`(model, args, kwargs)` with a tuple and a dictionary. A file may stand for the module
(`path/to/file.py:callable`).

bench: the times of your model in eager mode, under Inductor and under bla, after its results were
compared with fp64; or those of a suite against the memory floor, as CSV and plots; see
bla_inductor/bench/cases.py for the suites.

doctor: what is installed, what runs on this machine, how exact it is, and what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bla_inductor.errors import BlaError
from bla_inductor.example import Example, UsageError

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
    except (BlaError, UsageError) as error:
        parser.error(str(error))


def _explain(target: str) -> int:
    from bla_inductor.explainer import explain

    example = Example.load(target)
    report = explain(example.model, *example.args, **example.kwargs)
    print(report)
    return 0 if report.matches else 1


if __name__ == "__main__":
    sys.exit(main())
