"""What differs between the versions of torch that bla supports: 2.11 and later. Only this knows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx


def inference_aware_pass() -> type | None:
    """The class of the passes that Inductor calls as `p(graph, is_inference)`, if it has one."""
    from torch._inductor import custom_graph_pass

    return getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


def isolated() -> dict[str, Any]:
    """Arguments of `torch.compile` that keep its cache entries apart from everybody else's.

    Without it (before 2.13) a compilation counts towards the recompile limit of the functions
    that it meets after a graph break.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def register_decompositions(table: Mapping[Any, Callable[..., Any]]) -> None:
    """Add decompositions of our own operators to Inductor's table.

    Inductor keeps a second table, derived from the first when it is first needed: it is made anew.
    """
    from torch._inductor import decomposition

    for operator, function in table.items():
        if operator not in decomposition.decompositions:  # from a call that failed half-way
            decomposition.register_decomposition([operator])(function)
    derived = getattr(decomposition, "fast_random_decomps", None)
    if derived is not None and hasattr(derived, "cache_clear"):
        derived.cache_clear()


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Operators arrive at dispatch modes whole, and views of tensors are not tracked."""
    return torch._C._AutoDispatchBelowADInplaceOrView()


@contextlib.contextmanager
def replacements(gm: fx.GraphModule) -> Iterator[dict[str, str]]:
    """The names of nodes whose readers are given another node, and the name of that node."""
    replaced: dict[str, str] = {}

    def note(old: fx.Node, new: str, user: fx.Node) -> None:
        replaced[old.name] = new

    with gm._set_replace_hook(note):
        yield replaced


def clamp_is_flat_at_its_bounds() -> bool:
    """Whether `x.clamp(min=a)` has the derivative 0 where x is a (since 2.14); before, it is 1."""
    return torch.__version__ >= "2.14"


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor; of the module, since nightly builds come in packages of other names."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def pipelines_a_shared_operand() -> bool:
    """Whether Triton for sm_100 pipelines two products of one operand that the loop computes: 3.6
    fails an assertion in `CoarseSchedule::isOpBefore`.
    """
    return triton_version() >= (3, 7)


def pipelines_inline_assembly() -> bool:
    """Whether Triton for sm_100 pipelines a loop of products with inline assembly: before 3.9 it
    "doesn't know how to predicate this op".
    """
    return triton_version() >= (3, 9)


def fits_query_tiles() -> bool:
    """Whether the query pass fits into registers in its best tiles: 16 rows with 4 warps for 65 to
    128 features, and for fp32, and 64 rows with 8 warps above. As Triton 3.6 compiles it, it does;
    as 3.9 does, 40 to 96 bytes spill.
    """
    return triton_version() < (3, 7)


@cache
def gives_kernels_memory() -> bool:
    """Whether a kernel may need memory of its own, as descriptors do (`kernels.tiles`).

    Triton asks an allocator for it that is set for each thread, and without one it raises. Inductor
    sets one, from torch 2.13 on at the first launch of a kernel only, so that the same graph called
    in another thread would fail. Hence what threads have before any is set asks torch instead of
    raising; an allocator that somebody sets comes first, as ever.
    """
    try:
        from triton.runtime import _allocation
    except ImportError:
        return False
    unset = getattr(_allocation, "_NULL_ALLOCATOR", None)
    if unset is None or type(unset) is not getattr(_allocation, "NullAllocator", None):
        return False

    def allocate(_: Any, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    type(unset).__call__ = allocate
    return True


def without_compiled_autograd() -> contextlib.AbstractContextManager[None]:
    """A backward pass inside runs at once, whatever compiled autograd is doing around it."""
    from torch._dynamo import compiled_autograd

    disable = getattr(compiled_autograd, "_disable", None)
    return disable() if disable is not None else contextlib.nullcontext()


def compile_with(
    settings: Any,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    around: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Any:
    """Inductor under `settings`, a `torch._TorchCompileInductorWrapper`, with `around(f)` in the
    place of f, which compiles one graph of AOTAutograd's, forward or backward.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    known = inspect.signature(compile_fx).parameters
    name = getattr(settings, "name", None)
    region: dict[str, Any] = {"compile_region_name": name} if "compile_region_name" in known else {}
    return compile_fx(
        gm,
        example_inputs,
        inner_compile=around(compile_fx_inner),
        config_patches=settings.config,
        **region,
    )


def guard_forward_mode() -> None:
    """Have the graph that is being compiled compiled anew inside and outside of
    torch.autograd.forward_ad; torch guards on it only where the traced code enters it.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None:
        guard = GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL)
        context.guards_context.dynamo_guards.add(guard)


def opens_transform(function: Any) -> bool:
    """Whether a graph that calls `function` begins or ends a torch.func transform, or forward mode:
    its levels, too, are functorch's in 2.13, but torch._C's in 2.11.
    """
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__name__", "")
    level = "functorch" in module and "_nesting" in name
    return level or (module.startswith("torch.") and "dual_level" in name)


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a torch.func transform, and so has no storage. Dynamo compiles graphs
    that are given such in 2.11, and steps aside in 2.13.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
