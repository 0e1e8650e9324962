"""Import a package although something that it imports is not installed.

Some packages import training tools, or torchvision, beside their models: torch_geometric for its
downloads, denoising-diffusion-pytorch for its Trainer. torchvision would bring another build of
torch, and no model here calls any of them. While such a package is imported, an empty module stands
where a missing one would. Afterwards it is gone: other packages try an import, or look into
`sys.modules`, to see what is there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

__all__ = ["import_without"]


class Absent(type):
    """The class of every name taken from a missing module: it can be subclassed, nested and
    annotated with; to make an instance fails, so that no test uses one unawares.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise ModuleNotFoundError(f"{cls.__name__} is of a package that is not installed")


class _Module(types.ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_without(module: str, *missing: str) -> types.ModuleType:
    """The module, imported with stand-ins for those top-level packages of `missing` that are not
    installed.
    """
    finder = _Finder([name for name in missing if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] in finder.names]:
            del sys.modules[name]
