"""`with bla_inductor.debug(folder):` everything about each graph compiled inside, as files.

    folder/graph_0/before.py     Dynamo's graph, as the user wrote it, with the user's lines
                   after.py      the graph that went to the inner compiler
                   terms.txt     what the algebra made of each node: its axes, and its Term
                   report.txt    matches and refusals with their reasons, versions, options
                   forward.py    what Inductor made of it: the calls, and every kernel's source
                   backward.py   of the gradients; without any, inference.py alone

`backward.py` comes when the backward is compiled, with symbolic sizes at the first backward, which
may be after the block. The last three are there with inner="inductor" only. Where a graph was
refused as a whole, or the compiler raised, what came before that is there.
"""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bla_inductor._version import __version__

if TYPE_CHECKING:
    from bla_inductor.options import Options
    from bla_inductor.report import Report

__all__ = ["Recorder", "debug", "folder_in_force", "recorder"]

log = logging.getLogger(__name__)

_lock = threading.Lock()
_folders: list[_Folder] = []


class _Folder:
    """Where one `debug` writes, and how many graphs it has seen."""

    def __init__(self, path: Path) -> None:
        self.path, self.graphs = path, 0


@contextmanager
def debug(folder: str | PathLike[str]) -> Iterator[Path]:
    """Write down each graph that `backend="bla"` compiles inside, in any thread.

    folder: made if it is not there; graphs already in it stay, and the numbering goes on. Gives the
    path. Of blocks inside each other, the innermost writes.

    Inductor's caches are not used inside, because they would leave nothing to write. What Dynamo
    has compiled before is not compiled again: call `torch.compiler.reset()` before, as a warning
    says if nothing was compiled inside. A file that cannot be written is a warning; a folder that
    cannot be made raises OSError.
    """
    path = Path(folder).absolute()
    path.mkdir(parents=True, exist_ok=True)
    mine = _Folder(path)
    with _lock:
        _folders.append(mine)
    try:
        yield path
    finally:
        with _lock:
            _folders.remove(mine)
        if not mine.graphs:
            log.warning(
                "nothing was compiled with backend='bla' inside debug(%r). What was compiled "
                "before is used as it is: call torch.compiler.reset() first.",
                str(folder),
            )


def folder_in_force() -> Path | None:
    with _lock:
        return _folders[-1].path if _folders else None


def recorder(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Recorder | None:
    """What writes down the compilation of `gm`, which is still as the user wrote it; None outside
    of `debug`.
    """
    with _lock:
        if not _folders:
            return None
        folder = _folders[-1]
        folder.graphs += 1
    try:
        made = _new_folder(folder.path)
    except OSError as error:
        log.warning("debug: no folder for a graph in %s: %s", folder.path, error)
        return None
    found = Recorder(made)
    found.write("before.py", lambda: _readable(gm))
    found.write("terms.txt", lambda: _terms(gm, example_inputs))
    return found


def _new_folder(path: Path) -> Path:
    number = 0
    while True:
        try:
            (path / f"graph_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return path / f"graph_{number}"


class Recorder:
    """Writes the files of one graph. Nothing here raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: Callable[[], str]) -> None:
        """Into a file that is not there yet: `forward.py`, then `forward_1.py`."""
        try:
            stem, _, suffix = name.partition(".")
            for number in range(1000):
                path = self.folder / (f"{stem}_{number}.{suffix}" if number else name)
                if not path.exists():
                    path.write_text(text().rstrip() + "\n", encoding="utf-8")
                    return
        except Exception as error:
            log.warning("debug: %s was not written: %s: %s", name, type(error).__name__, error)
            log.debug("the failure to write", exc_info=True)

    def rewritten(self, gm: fx.GraphModule, report: Report, options: Options) -> None:
        self.write("after.py", lambda: _readable(gm))
        self.write("report.txt", lambda: _told(report, options))

    def writing(self, compile_one: Callable[..., Any]) -> Callable[..., Any]:
        """`compile_one`, Inductor's for one graph of AOTAutograd's; its output is written down."""

        @functools.wraps(compile_one)
        def compile_and_write(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            made = compile_one(gm, inputs, **kwargs)
            kind = "backward" if kwargs.get("is_backward") else "forward"
            name = "inference" if kwargs.get("is_inference") else kind
            self.write(f"{name}.py", lambda: made.source_code)
            return made

        return compile_and_write


def _readable(gm: fx.GraphModule) -> str:
    text: str = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    return text


def _told(report: Report, options: Options) -> str:
    rules = "\n".join(f"    {name}: {times}" for name, times in sorted(report.rules.items()))
    return (
        f"{report}\n\nbla_inductor {__version__}, torch {torch.__version__}\n{options}\n"
        f"analysis: {report.seconds * 1e3:.1f} ms\nrules that were asked (tried) and told:\n{rules}"
    )


def _terms(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    from bla_inductor.explainer import copy_graphs
    from bla_inductor.weights import weights

    return "\n".join(_graph_terms("", copy_graphs(gm), example_inputs, weights(gm)))


def _graph_terms(
    name: str, gm: fx.GraphModule, inputs: Sequence[Any], fixed: Sequence[bool]
) -> Iterator[str]:
    from bla_inductor.algebra import observe
    from bla_inductor.terms import described

    try:
        seen = observe(gm, inputs, fixed)
    except Exception:
        yield f"the graph{name} could not be observed:\n{traceback.format_exc()}"
        return
    yield from described(seen)
    for number, body in enumerate(seen.bodies):
        inner = f"{name} body {number}"
        yield f"\nthe graph{inner}, called by the one above"
        known = [
            n.meta.get("example_value", n.meta.get("val"))
            for n in body.module.graph.find_nodes(op="placeholder")
        ]
        with torch.autocast(*body.autocast) if body.autocast else nullcontext():
            yield from _graph_terms(inner, body.module, known, body.fixed)
