"""`python -m tests.imagined [NAME…]`: the programs with these names, or all; 1 if one differs."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from unittest import mock

from tests.imagined import device


def main(names: list[str]) -> int:
    device.imagine()

    import torch
    from bla_inductor.kernels import short_heuristics

    from tests.imagined.programs import PROGRAMS
    from tests.imagined.session import Session

    session, wrong = Session(), 0
    try:
        for name in names or PROGRAMS:
            torch.manual_seed(0)
            start, program = time.perf_counter(), PROGRAMS[name]
            inputs = [torch.randn(shape).requires_grad_() for shape in program.shapes]
            with ExitStack() as patches:
                for which in ("short_forward_parts", "short_backward_parts"):
                    if "by passes" in name:
                        none = mock.patch.object(short_heuristics, which, return_value=0)
                        patches.enter_context(none)
                found = session.differences(program.make(), inputs)
            if program.needless and any(program.needless in code for code in session.modules):
                found.append(f"a kernel is named {program.needless}")
            wrong += bool(found)
            told = (
                f"{'differs' if found else 'equal'}: {name} ({time.perf_counter() - start:.1f} s)"
            )
            print(told, *found, sep="\n  ", flush=True)
    finally:
        session.close()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
