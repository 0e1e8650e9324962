"""Inductor's code for CUDA on a machine without a GPU.

Fake tensors stand for the device's, and what Inductor and Triton ask a device about is answered
here, as an H100 would. `code(function, make)` is the Python module that Inductor would run.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from bla_inductor.options import Options
from bla_inductor.stamp import CacheStamp

CAPABILITY = (9, 0)
_PROPERTIES = types.SimpleNamespace(
    name="imagined H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="0",
    is_integrated=False,
    is_multi_gpu_board=False,
)


class _Driver:
    """The part of Triton's driver that is asked while code is generated."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return CAPABILITY


def _answers(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _format_of_cudnn(x: torch.Tensor, weight: torch.Tensor, _: Any) -> torch.memory_format:
    """That of a convolution's result: channels last where one of its operands is."""
    last = torch.channels_last
    if any(suggest_memory_format(t) == last for t in (x, weight)):
        return last
    return torch.contiguous_format


@contextlib.contextmanager
def imagined_gpu() -> Iterator[None]:
    """Everything that asks for a CUDA device finds one."""
    import torch._inductor.codegen.triton
    import torch._inductor.compile_fx
    import torch._inductor.select_algorithm
    import torch._subclasses.fake_tensor
    from torch._dynamo.device_interface import CudaInterface
    from triton.runtime.driver import driver

    found = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _PROPERTIES,
        "get_device_capability": CAPABILITY,
        "get_device_name": _PROPERTIES.name,
        "is_tf32_supported": True,
        "synchronize": None,
        "_lazy_init": None,
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _PROPERTIES,
        "get_compute_capability": 10 * CAPABILITY[0] + CAPABILITY[1],
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "synchronize": None,
    }
    with contextlib.ExitStack() as patches:

        def answer(owner: Any, name: str, value: Any, wrap: Any = lambda f: f) -> None:
            if hasattr(owner, name):
                patches.enter_context(mock.patch.object(owner, name, wrap(_answers(value))))

        for name, value in found.items():
            answer(torch.cuda, name, value)
        for name, value in interface.items():
            answer(CudaInterface, name, value, staticmethod)
        answer(CudaInterface.Worker, "get_device_properties", _PROPERTIES, staticmethod)
        answer(CudaInterface.Worker, "current_device", 0, staticmethod)
        answer(torch._subclasses.fake_tensor, "init_gpu_context", None)
        answer(torch._C, "_select_conv_backend", torch._C._ConvBackend.Cudnn)
        name = "_conv_determine_backend_memory_format"
        patches.enter_context(mock.patch.object(torch._C, name, _format_of_cudnn))
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith(("torch._inductor", "torch.utils._triton", "torch._dynamo")):
                for name in ("has_triton", "is_gpu_available", "is_triton_capable"):
                    if name in vars(module):
                        answer(module, name, True)
                if "get_gpu_type" in vars(module):
                    answer(module, "get_gpu_type", "cuda")
        previous = driver._active
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver.set_active(previous)


class Make:
    """Makes fake tensors and symbolic sizes for the example inputs."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._shapes = mode.shape_env
        self._symbols = 0

    def size(self, value: int) -> Any:
        """A symbol with `value` as its hint."""
        from torch._dynamo.source import ConstantSource

        self._symbols += 1
        source = ConstantSource(f"size{self._symbols}")
        symbol = self._shapes.create_symbol(
            value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        return self._shapes.create_symintnode(symbol, hint=value, source=source)

    def tensor(self, *shape: Any, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)


def code(
    function: Callable[..., Any],
    make: Callable[[Make], Sequence[torch.Tensor]],
    inference: bool = False,
    kept: int = 0,
    **config_patches: Any,
) -> str:
    """The module that Inductor writes for `function` on the fake tensors that `make` makes, without
    its comments. inference: as it does for a graph that has no backward. kept: how many of the
    results, the last ones, are for the backward alone.
    """
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = FakeTensorMode(shape_env=ShapeEnv())
    settings = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "triton.autotune_at_compile_time": False,
        **config_patches,
    }
    with imagined_gpu(), config.patch(settings), tracing(TracingContext(mode)):
        with mode:
            inputs = list(make(Make(mode)))
        with torch.no_grad():
            gm = aot_export_joint_simple(
                lambda *args: _flat(function(*args)),
                inputs,
                trace_joint=False,
                decompositions=select_decomp_table(),
            )
        compile_fx.record_original_output_strides(gm)
        output = gm.graph.output_node()
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0]) - kept))
        debug = DebugContext()
        with V.set_fake_mode(mode), debug, V.set_debug_handler(debug):
            with mode:
                CacheStamp(Options())(gm.graph)  # our pass in Inductor's configuration
                post_grad_passes(gm, True)
            graph = GraphLowering(
                gm, shape_env=mode.shape_env, example_inputs=inputs, is_inference=inference
            )
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                written, *_ = graph.codegen()
    lines = str(getattr(written, "value", written)).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def _flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def kernels(code: str) -> dict[str, str]:
    """The source of each Triton kernel in a module, by its name."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)
    return dict(found)


def assembled(name: str, source: str) -> Any:
    """The kernel as Triton and ptxas compile it for the imagined device; the texts are in `asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    seen: dict[str, Any] = {}

    def decorator(**settings: Any) -> Callable[..., Any]:
        seen.update(settings)
        return lambda function: function

    file = f"<assembled {name} {hash(source)}>"
    scope: dict[str, Any] = {"__name__": file, "__file__": file}
    source = source.replace("triton_helpers.set_driver_to_gpu()", "")
    source = source.replace("@triton_heuristics.", "@__heuristics__.")
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope["__heuristics__"] = types.SimpleNamespace(template=decorator)
    with imagined_gpu():
        exec(compile(source, file, "exec"), scope)
    meta = seen["triton_meta"]
    return triton.compile(
        ASTSource(
            fn=scope[name],
            signature=dict(meta["signature"]),
            constexprs=dict(meta["constants"]),
            attrs=dict(meta["configs"][0]),
        ),
        target=GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32),
        options={"num_warps": seen["num_warps"], "num_stages": seen["num_stages"]},
    )
