"""Functions compiled for the imagined GPU, beside themselves in eager mode on the CPU."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compile import nogpu
from tests.imagined.interpreter import Interpreter
from tests.numerics import error

Function = Callable[..., Any]
_TOLERANCE = 1e-4  # of a norm, in fp32; what this is to find is off by 1e-3 and more
_SETTINGS = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "online_softmax": False,  # its combination of two is not for the interpreter
    "shape_padding": False,
    "triton.autotune_at_compile_time": False,
}


class _ConstantsOnCpu(TorchDispatchMode):
    """Inductor folds constants on their device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def here(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return function(*map(here, args), **{k: here(v) for k, v in (kwargs or {}).items()})


class Session:
    """modules: what Inductor wrote for the last function, the forward first."""

    def __init__(self) -> None:
        self._interpreter = Interpreter()
        self.modules: list[str] = []

    def close(self) -> None:
        self._interpreter.close()

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        folder = joint_graph.UniformValueConstantFolder
        deduced = folder._deduce_value

        def deduce(*args: Any) -> Any:
            with _ConstantsOnCpu():
                return deduced(*args)

        def module(graph: GraphLowering, written: Any) -> Any:
            code = written.value
            self.modules.append(code)
            graph.cache_key, graph.cache_path, graph.cache_linemap = "", __file__, []
            return types.SimpleNamespace(call=lambda args: self._run(code, args), __file__=__file__)

        with (
            nogpu.imagined_gpu(),
            mock.patch.object(torch.cuda, "_exchange_device", return_value=0),
            mock.patch.object(torch.cuda, "_maybe_exchange_device", return_value=0),
            mock.patch.object(folder, "_deduce_value", deduce),
            # They make patterns with real tensors on the device.
            mock.patch.object(fuse_attention, "_sfdp_init"),
            mock.patch.object(pad_mm, "_pad_mm_init"),
            config.patch(_SETTINGS),
            mock.patch.object(GraphLowering, "_compile_to_module_lines", module),
        ):
            yield

    def _run(self, code: str, args: list[Any]) -> tuple[Any, ...]:
        given = list(args)
        args.clear()
        with unset_fake_temporarily():
            return tuple(self._interpreter.run(code, given))

    @contextlib.contextmanager
    def compiled(
        self, function: Function, tensors: Sequence[Tensor], **options: Any
    ) -> Iterator[Any]:
        """What `function`, compiled, returns for tensors of the CPU. Inside, autograd runs its
        compiled backward.
        """
        mode = FakeTensorMode()
        real: dict[int, Tensor] = {}
        if isinstance(function, nn.Module):
            function = _imagined(function, real, mode)
        inputs = [_on_gpu(x, mode) for x in tensors]
        real |= {id(made): x for made, x in zip(inputs, tensors, strict=True)}

        def backend(gm: Any, example_inputs: Any) -> Function:
            run = lookup_backend("bla")(gm, example_inputs, options=options)

            def call(*args: Any) -> Any:
                with unset_fake_temporarily():
                    return run(*(real[id(a)] if isinstance(a, FakeTensor) else a for a in args))

            return call

        torch._dynamo.reset()
        self.modules.clear()
        with self._compiling(), mode:
            result = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
            with unset_fake_temporarily():
                yield result

    def differences(self, function: Function, tensors: Sequence[Tensor]) -> list[str]:
        """What is not as in eager mode: results and their strides, gradients, buffers; operators
        that are called where they should be fused; or that there is not one attention.
        """
        theirs = copy.deepcopy(function)
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        expected = _all_results(theirs(*copies), theirs, copies)
        counters.clear()
        with self.compiled(function, tensors, rewrite="always") as result:
            got = _all_results(result, function, tensors)
        found = [
            f"{name} is off by {error(mine, exact):.1e}"
            for (name, mine), exact in zip(got.items(), expected.values(), strict=True)
            if not error(mine.double(), exact.double()) <= _TOLERANCE
        ]
        found += [
            f"{name} has strides {got[name].stride()} and not {expected[name].stride()}"
            for name in got
            if name.startswith("result") and got[name].stride() != expected[name].stride()
        ]
        if counters["bla"]["matched"] != 1:
            found.append(f"{counters['bla']['matched']} matches")
        lines = [line.strip() for code in self.modules for line in code.splitlines()]
        called = [x for x in lines if "torch.ops.bla." in x and not x.startswith("#")]
        return found + called


def _on_gpu(x: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor laid out as x."""
    with mode:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return made.requires_grad_(x.requires_grad)


def _imagined(module: nn.Module, real: dict[int, Tensor], mode: FakeTensorMode) -> nn.Module:
    """A copy of `module` on the GPU; `real` gets what its tensors stand for."""
    memo: dict[int, Any] = {}
    for x in [*module.parameters(), *module.buffers()]:
        made = _on_gpu(x, mode)
        if isinstance(x, nn.Parameter):
            made = nn.Parameter(made, requires_grad=x.requires_grad)
        memo[id(x)] = made
        real[id(made)] = x
    return copy.deepcopy(module, memo)


def _all_results(out: Any, function: Function, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Results, gradients of all that asks for one, buffers, by name."""
    results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
    found = {f"result {i}": x.detach() for i, x in enumerate(results)}
    sources = {f"gradient of input {i}": x for i, x in enumerate(tensors)}
    if isinstance(function, nn.Module):
        found |= dict(function.named_buffers())
        sources |= {f"gradient of {name}": p for name, p in function.named_parameters()}
    sources = {name: x for name, x in sources.items() if x.requires_grad}
    if not (sources and any(x.requires_grad for x in results)):
        return found
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    grads = torch.autograd.grad(
        results, list(sources.values()), incoming, allow_unused=True, materialize_grads=True
    )
    return found | dict(zip(sources, grads, strict=True))
