"""What the command line is pointed at: `module:callable` or `path/to/file.py:callable`.

The callable takes no arguments and returns `(model, *args)`, or `(model, args, kwargs)` with a
tuple and a dictionary; `model` is a module or a function.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Example", "UsageError"]


class UsageError(Exception):
    """The command was given something that it cannot use; the text says what it takes."""


@dataclass(frozen=True)
class Example:
    """A model and one call of it: `model(*args, **kwargs)`."""

    model: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @classmethod
    def load(cls, target: str) -> Example:
        """Import what `target` names and call it. Raises UsageError, and what the user's code
        raises.
        """
        function = _callable(target)
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise UsageError(
                f"{target} is called without arguments ({error}); it should return (model, *args)"
            ) from error
        made = function()
        if not isinstance(made, tuple) or not made or not callable(made[0]):
            raise UsageError(
                f"{target} returned a {type(made).__name__}; it should return (model, *args) or "
                "(model, args, kwargs)"
            )
        model, *rest = made
        if len(rest) == 2 and isinstance(rest[0], tuple | list) and isinstance(rest[1], Mapping):
            return cls(model, rest[0], rest[1])
        return cls(model, rest, {})


def _callable(target: str) -> Callable[[], Any]:
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
