"""Runs modules that Inductor wrote for CUDA, on the CPU, in Triton's interpreter.

`python interpreted_graphs.py FILE…` with TRITON_INTERPRET=1, which must be set before triton is
imported: each FILE holds {"code", "inputs", "expected", "kept"}, and the module's results must be
the expected ones to fp16 accuracy, with their strides but for the last `kept`. Buffers start as
NaN, so that an element nobody wrote is seen. No bf16 (its products are garbage in the interpreter),
and of libdevice what the interpreter can do.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "ZBLOCK": 4, "R0_BLOCK": 64}
_numbers = itertools.count()


class _Decorators:
    """Stands for `triton_heuristics`: no tuning, no launcher."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: lambda function: function


class _Libdevice:
    """The functions of CUDA's library that the interpreter can do."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        known = {
            "abs": tl.abs,
            "exp": tl.exp,
            "expm1": lambda x: tl.exp(x) - 1,
            "log1p": lambda x: tl.log(1 + x),
            "pow": lambda x, y: tl.exp(y * tl.log(x)),
            "rsqrt": lambda x: 1 / tl.sqrt(x),
            "sqrt": tl.sqrt,
            "tanh": lambda x: 2 * tl.sigmoid(2 * x) - 1,
        }
        return known[name]


class _Kernel:
    """A kernel's source with the `run` that the generated module calls."""

    def __init__(self, name: str, source: str) -> None:
        file = f"<interpreted {next(_numbers)}>"
        head = "triton_heuristics = __decorators__\n@triton_heuristics."
        source = source.replace("@triton_heuristics.", head, 1)
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope = {"__name__": file, "__file__": file, "__decorators__": _Decorators()}
        exec(compile(source, file, "exec"), scope)
        scope["libdevice"] = _Libdevice()
        self.function: Any = scope[name]
        self.names = list(inspect.signature(self.function.fn).parameters)

    def run(self, *args: Any, stream: int) -> None:
        given = dict(zip(self.names, args, strict=False))
        rest = args[len(given) :]
        blocks = {name: _BLOCKS[name] for name in self.names if name in _BLOCKS}
        if rest:  # a template gets its grid
            self.function[tuple(map(int, rest))](*args[: len(given)], **blocks)
            return
        grid = [
            -(-int(given[f"{axis}numel"]) // blocks.get(f"{axis.upper()}BLOCK", 1))
            for axis in "xyz"
            if f"{axis}numel" in given
        ]
        self.function[tuple(grid)](*given.values(), **blocks)


class _AsyncCompile:
    def triton(self, name: str, source: str, **_: Any) -> _Kernel:
        return _Kernel(name, source)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty_strided(size, stride, dtype=dtype)
    return x.fill_(float("nan")) if dtype.is_floating_point else x.fill_(99)


def run(code: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of the module `code` on CPU tensors."""
    lines = []
    for line in code.splitlines():
        bare = line.strip()
        if "_cuda_getCurrentRawStream" in bare or bare.startswith("torch.cuda.set_device("):
            continue
        if bare.startswith("with torch.cuda._DeviceGuard("):
            line = line[: len(line) - len(bare)] + "if True:"
        if bare.startswith("async_compile = AsyncCompile()"):
            line = "async_compile = __async_compile__"
        if bare.startswith("empty_strided_cuda ="):
            line = "empty_strided_cuda = __empty__"
        lines.append(line)
    module = types.ModuleType("interpreted")
    vars(module).update(
        __async_compile__=_AsyncCompile(),
        __empty__=_empty,
        get_raw_stream=lambda index: 0,
    )
    exec("\n".join(lines), vars(module))
    return list(module.call(list(inputs)))


def check(file: str) -> None:
    case = torch.load(file)
    results = run(case["code"], case["inputs"])
    assert len(results) == len(case["expected"])
    seen = len(results) - case["kept"]
    for i, (result, expected) in enumerate(zip(results, case["expected"], strict=True)):
        assert result.shape == expected.shape, (result.shape, expected.shape)
        strides = result.stride(), expected.stride()
        assert i >= seen or strides[0] == strides[1], strides
        torch.testing.assert_close(result, expected, rtol=5e-3, atol=5e-3)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        check(path)
        print("equal", path)
