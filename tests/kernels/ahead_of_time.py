"""Compile the kernels for GPUs that are not there: record the launches of a call on meta tensors,
then run Triton and ptxas on exactly those arguments. The recorded launches carry the run-time
heuristics' block sizes and warps.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from bla_inductor.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = (
    "state_kernel",
    "sum_splits",
    "output_kernel",
    "query_pass_kernel",
    "key_pass_kernel",
    "wide_query_kernel",
)
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, Triton's signature, and what is constant."""

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


class _Recorder:
    def __init__(self, name: str, launches: list[Launch]) -> None:
        self.name, self.launches = name, launches
        self.function = getattr(launch, name)

    def __getitem__(self, grid: Any) -> Any:
        def record(*args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            names = self.function.arg_names
            signature: dict[str, str] = {}
            divisible = []
            for name, value in zip(names, args, strict=False):
                if isinstance(value, torch.Tensor):
                    signature[name] = _POINTERS[value.dtype]
                    divisible.append(name)
                elif isinstance(value, float):
                    signature[name] = "fp32"
                elif value == 1:
                    constants[name] = 1
                else:
                    signature[name] = "i32" if abs(value) < 2**31 else "i64"
                    if value % 16 == 0:
                        divisible.append(name)
            signature.update(dict.fromkeys(constants, "constexpr"))
            ordered = tuple((n, signature[n]) for n in names)
            self.launches.append(
                Launch(
                    self.name,
                    ordered,
                    tuple(constants.items()),
                    tuple(divisible),
                    num_warps,
                    num_stages,
                )
            )

        return record


def record(call: Any) -> list[Launch]:
    """The distinct launches that `call()` makes; none of them runs."""
    launches: list[Launch] = []
    originals = {name: getattr(launch, name) for name in KERNELS}
    try:
        for name in KERNELS:
            setattr(launch, name, _Recorder(name, launches))
        call()
    finally:
        for name, original in originals.items():
            setattr(launch, name, original)
    return list(dict.fromkeys(launches))


def compile_for(item: Launch, capability: int) -> Resources:
    """Registers, spills and shared memory of one launch on sm_<capability>."""
    function = getattr(launch, item.name)
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature=dict(item.signature),
        constexprs=dict(item.constants),
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
