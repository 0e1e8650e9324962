"""A program that shows by itself that a rewritten graph is less accurate than the original.

Two files in a new folder: `reproduce.py` holds the user's graph as a module, with the user's lines
as comments, compiles it with `backend="bla"` under the same options, modes and precision, and
prints the errors; `inputs.pt` holds the inputs and whatever the graph owns. Inputs of more than
256 MiB in all are not saved: random ones of the same kind take their place.
"""

from __future__ import annotations

import builtins
import re
import tempfile
import types
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bla_inductor._version import __version__
from bla_inductor.debugger import folder_in_force
from bla_inductor.examination import Graphs
from bla_inductor.options import Options, variable_of
from bla_inductor.trial import duplicates
from bla_inductor.verdict import Verification

__all__ = ["write_reproduction"]

MOST_BYTES = 256 * 2**20

_SCRIPT = '''"""A graph that bla_inductor {version}, on torch {torch}, made less accurate.

{found}

Run it with `python {name}`; {kept}.
"""

import os
import pathlib

{environment}
import torch

import bla_inductor

{imports}

FOLDER = pathlib.Path(__file__).parent


def put(module, path, value):
    """Set module.a.b.c, with the modules between."""
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, torch.nn.Module())
        module = getattr(module, name)
    setattr(module, last, value)


def like(shape, stride, dtype, device, requires_grad):
    """Random numbers in the place of an input."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flat = torch.randn(size, device=device) if dtype.is_floating_point else torch.ones(size)
    made = flat.to(device, dtype).as_strided(shape, stride)
    return made.clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)


{classes}

torch.manual_seed(0)
{settings}
saved = torch.load(FOLDER / "inputs.pt", weights_only=False)
inputs = {inputs}
graph = Graph(saved["owned"])
with {contexts}:
    found = bla_inductor.verify(graph, *inputs)  # compiles with backend="bla"
print(found)
raise SystemExit(not found.ok)
'''


def write_reproduction(graphs: Graphs, inputs: Sequence[Any], found: Verification) -> Path:
    """Write the program and its inputs; the path of the program."""
    inside = folder_in_force()
    folder = Path(tempfile.mkdtemp(prefix="bla-reproduction-", dir=inside)).absolute()
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    small = sum(x.numel() * x.element_size() for x in tensors) <= MOST_BYTES
    owned: dict[str, Any] = {}  # by path: a tensor, a module, or the name of a class
    classes: list[str] = []
    imports: dict[str, Any] = {}
    for path, module in _graphs(graphs.written):
        name = "Graph" + "".join(f"_{part}" for part in path.split(".") if part)
        if path:
            owned[path] = name
        code = module.graph.python_code("self", verbose=True)
        words = set(re.findall(r"\w+", code.src))
        imports.update({k: v for k, v in code.globals.items() if k in words})
        body = "\n".join(f"    {line}".rstrip() for line in code.src.strip().splitlines())
        classes.append(_CLASS.format(name=name, body=body))
        owned.update(
            {
                f"{path}.{node.target}".lstrip("."): _attribute(module, str(node.target))
                for node in module.graph.nodes
                if node.op in ("get_attr", "call_module")
                and not isinstance(_attribute(module, str(node.target)), fx.GraphModule)
            }
        )
    values = [
        x.requires_grad_(y.requires_grad) if isinstance(y, Tensor) else y
        for x, y in zip(duplicates(inputs, {}), inputs, strict=True)
    ]
    state = {"owned": owned, "inputs": values if small else None}
    torch.save(state, folder / "inputs.pt")
    script = folder / "reproduce.py"
    script.write_text(
        _SCRIPT.format(
            version=__version__,
            torch=torch.__version__,
            found=str(found).replace("\\", "/").replace('"""', "'''"),
            name=script.name,
            kept="inputs.pt holds the inputs" if small else "the inputs are random, being large",
            environment="\n".join(_environment(graphs.options)),
            imports="\n".join(_imports(imports)),
            classes="\n\n".join(classes),
            settings="\n".join(_settings(graphs)),
            inputs='saved["inputs"]' if small else _random(inputs),
            contexts=", ".join(_contexts(tensors)),
        )
    )
    return script


_CLASS = """class {name}(torch.nn.Module):
    def __init__(self, owned):
        super().__init__()
        for path, value in owned.items():
            put(self, path, globals()[value]({{}}) if isinstance(value, str) else value)

{body}
"""


def _graphs(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The graph and those nested in it, by path; a body after what calls it."""
    return [(n, m) for n, m in gm.named_modules() if isinstance(m, fx.GraphModule)]


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _environment(options: Options) -> list[str]:
    """bla's own options, as variables: `verify` reads those."""
    default = Options()
    return [
        f"os.environ[{variable_of(row.name)!r}] = {str(getattr(options, row.name))!r}"
        for row in fields(Options)
        if row.name in ("inner", "rewrite", "mode")
        and getattr(options, row.name) != getattr(default, row.name)
    ]


def _imports(names: dict[str, Any]) -> list[str]:
    """How the names in the code of a graph come to be, beside `torch`."""
    lines = []
    for name, value in sorted(names.items()):
        kind = getattr(value, "__qualname__", "")
        home = getattr(value, "__module__", None)
        if name == "torch" or getattr(builtins, name, None) is value:
            continue
        if isinstance(value, types.ModuleType):
            lines.append(f"import {value.__name__} as {name}")
        elif value is type(None):
            lines.append(f"{name} = type(None)")
        elif isinstance(value, float):
            lines.append(f'{name} = float("{value}")')
        elif kind and home and "<" not in kind and "." not in kind:
            home = "torch" if value is torch.device else home
            lines.append(f"from {home} import {kind} as {name}")
        else:
            lines.append(f"# {name} = {value!r}".replace("\n", " "))
    return lines


def _settings(graphs: Graphs) -> list[str]:
    lines = [f"torch.set_float32_matmul_precision({torch.get_float32_matmul_precision()!r})"]
    for key, value in graphs.for_inductor.items():
        if isinstance(value, bool | int | float | str):
            lines.append(f"torch._inductor.config.{key} = {value!r}")
    return lines


def _contexts(tensors: Sequence[Tensor]) -> list[str]:
    lines = [f"torch.set_grad_enabled({torch.is_grad_enabled()})"]
    for device in sorted({x.device.type for x in tensors}):
        if torch.is_autocast_enabled(device):
            lines.append(f"torch.autocast({device!r}, {torch.get_autocast_dtype(device)})")
    return lines


def _random(inputs: Sequence[Any]) -> str:
    def row(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        shape = tuple(x.shape)
        return f"like({shape}, {x.stride()}, {x.dtype}, {str(x.device)!r}, {x.requires_grad})"

    return "\n".join(["[", *(f"    {row(x)}," for x in inputs), "]"])
