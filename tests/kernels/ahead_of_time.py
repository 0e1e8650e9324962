"""Compile the kernels for GPUs that are not there: record the launches of a call on meta tensors,
then run Triton and ptxas on exactly those arguments. The recorded launches carry the run-time
heuristics' block sizes and warps.
"""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from bla_inductor.kernels import heuristics, launch_backward, launching
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Phi:
    """One of the functions of a feature map."""

    text: str
    dtype: torch.dtype
    which: str

    def function(self) -> Any:
        return getattr(launching.feature_map(self.text, self.dtype), self.which)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's module and name, Triton's signature, and what is constant. It can be
    sent to another process, which Triton's functions cannot.
    """

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel; `spills` are bytes of stack or local memory a thread."""

    registers: int
    spills: int
    shared: int


def _recorded(kernel: Any, args: tuple[Any, ...], tile: Any, pdl: bool, constants: dict) -> Launch:
    names = kernel.arg_names
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    if pdl:
        constants["PDL"] = heuristics.overlaps_launches(args[0].device)
    signature: dict[str, str] = {}
    divisible = []
    for name, value in zip(names, args, strict=False):
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in plain:
            constants[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                divisible.append(name)
    signature.update(dict.fromkeys(constants, "constexpr"))
    return Launch(
        kernel.__module__,
        kernel.__name__,
        tuple((n, signature[n]) for n in names),
        tuple(constants.items()),
        tuple(divisible),
        tile.num_warps,
        tile.num_stages,
    )


def record(call: Any) -> list[Launch]:
    """The distinct launches that `call()` makes; none of them runs."""
    launches: list[Launch] = []
    original = launching.run
    feature_map = launching.feature_map

    def named(text, dtype):
        return launching.Map(text, Phi(text, dtype, "forward"), Phi(text, dtype, "gradient"))

    def run(kernel, programs, *args, tile, pdl=False, **constants):
        launches.append(_recorded(kernel, args, tile, pdl, constants))

    launching.run = run
    launching.feature_map = launch_backward.feature_map = named
    try:
        call()
    finally:
        launching.run = original
        launching.feature_map = launch_backward.feature_map = feature_map
    return list(dict.fromkeys(launches))


def compile_for(item: Launch, capability: int) -> Resources:
    """Registers, spills and shared memory of one launch on sm_<capability>."""
    kernel = getattr(importlib.import_module(item.module), item.name)
    names = kernel.arg_names
    constants = {k: v.function() if isinstance(v, Phi) else v for k, v in item.constants}
    source = ASTSource(
        fn=kernel,
        signature=dict(item.signature),
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in item.divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": item.num_warps, "num_stages": item.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match, usage
    registers, stack, local = map(int, match.groups())
    return Resources(registers, stack + local, compiled.metadata.shared)


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
