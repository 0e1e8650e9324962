"""diffusers' SANA transformer through `backend="bla"`: what is rewritten, how exact, how fast.

    make demo
    make demo ARGS="--tokens 4096 --layers 4 --device cuda --dtype bfloat16"

The weights are random and nothing is downloaded. The model is diffusers' own code; the only thing
said about it here is `torch.compile(model, backend="bla")`.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

import bla_inductor

Call = Callable[[], Any]
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model, inputs = sana(args)
    console.print(
        f"torch {torch.__version__} on {device_name(args.device)}: SanaTransformer2DModel, "
        f"{args.layers} layers of {args.heads} heads of 32, {args.tokens} tokens, "
        f"batch {args.batch}, {args.dtype}"
    )

    console.rule("bla_inductor.explain(model, ...)")
    console.print(str(bla_inductor.explain(model, **inputs)), markup=False)

    variants = {"eager": model}
    for backend in ("inductor", "bla"):
        variants[backend] = torch.compile(copy.deepcopy(model), backend=backend)

    console.rule("exactness")
    show_errors(model, variants, inputs)
    console.rule("time")
    show_times(variants, inputs, args)


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 1024, help="a square")
    parser.add_argument("--layers", type=int, default=4 if cuda else 2)
    parser.add_argument("--heads", type=int, default=70 if cuda else 16, help="SANA 1.6B: 70")
    parser.add_argument("--batch", type=int, default=2 if cuda else 1)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16" if cuda else "float32",
    )
    parser.add_argument("--seconds", type=float, default=3, help="spent on each column of times")
    args = parser.parse_args()
    if args.device == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        parser.error("Inductor needs a C++ compiler on a CPU, and there is neither g++ nor clang++")
    if math.isqrt(args.tokens) ** 2 != args.tokens:
        parser.error(f"--tokens {args.tokens} is no square; try {math.isqrt(args.tokens) ** 2}")
    return args


def sana(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """SANA with head dimension 32, as published, and cross attention over 64 caption tokens."""
    dim = args.heads * 32
    side = math.isqrt(args.tokens)
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    model = SanaTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=32,
        num_layers=args.layers,
        num_cross_attention_heads=args.heads // 2,
        cross_attention_head_dim=64,
        cross_attention_dim=dim,
        caption_channels=256,
        sample_size=side,
    )
    inputs = {
        "hidden_states": torch.randn(args.batch, 32, side, side, **to, requires_grad=True),
        "encoder_hidden_states": torch.randn(args.batch, 64, 256, **to),
        # small: diffusers takes the sine of timestep · frequency in float32
        "timestep": torch.ones(args.batch, **to),
    }
    return model.to(args.device).type(to["dtype"]).train(), inputs


class InFloat64(TorchFunctionMode):
    """Turns the model's own `.float()` and `.to(torch.float32)` into float64.

    SANA computes its attention in float32 whatever it is given, so a reference in float64 takes
    more than `model.double()`.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(wide, args), **kwargs)


def results(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradient of its mean square with respect to the latent."""
    latent = inputs["hidden_states"]
    out = model(**inputs, return_dict=False)[0]
    (gradient,) = torch.autograd.grad(out.square().mean(), latent)
    return [out.detach(), gradient]


def show_errors(
    model: torch.nn.Module, variants: dict[str, Any], inputs: dict[str, torch.Tensor]
) -> None:
    double = {name: value.detach().double() for name, value in inputs.items()}
    double["hidden_states"].requires_grad_()
    with InFloat64():
        exact = results(copy.deepcopy(model).double(), double)
    found = {name: results(variant, inputs) for name, variant in variants.items()}

    def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[str]:
        return [
            f"{(x.double() - y.double()).abs().max() / y.double().abs().max():.1e}"
            for x, y in zip(a, b, strict=True)
        ]

    table = Table("largest difference ÷ largest value", "output", "gradient of the latent")
    table.add_row("bla from eager", *distance(found["bla"], found["eager"]))
    for name, result in found.items():
        table.add_row(f"{name} from float64", *distance(result, exact))
    console.print(table)


def show_times(variants: dict[str, Any], inputs: dict[str, torch.Tensor], args: Any) -> None:
    def forward(model: Any) -> Call:
        return lambda: model(**inputs, return_dict=False)

    def both(model: Any) -> Call:
        def step() -> None:
            model.zero_grad()
            inputs["hidden_states"].grad = None
            model(**inputs, return_dict=False)[0].square().mean().backward()

        return step

    def rounds(calls: dict[str, Call]) -> dict[str, float]:
        """The median time of each in milliseconds, taken in turns, so that drift hits all alike."""
        for call in calls.values():
            call()  # compiles
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.monotonic() + args.seconds
        while not all(times.values()) or time.monotonic() < end:
            for name, call in calls.items():
                times[name].append(timed(call, args.device))
        return {name: statistics.median(values) * 1e3 for name, values in times.items()}

    steps = rounds({name: both(model) for name, model in variants.items()})
    with torch.no_grad():
        forwards = rounds({name: forward(model) for name, model in variants.items()})

    table = Table("", "forward", "forward + backward")
    for name in variants:
        table.add_row(name, f"{forwards[name]:.2f} ms", f"{steps[name]:.2f} ms")
    console.print(table)
    for what, times in (("forward", forwards), ("forward + backward", steps)):
        console.print(
            f"{what}: bla is {compared(times['eager'], times['bla'])} eager and "
            f"{compared(times['inductor'], times['bla'])} inductor"
        )


def compared(theirs: float, ours: float) -> str:
    if abs(theirs - ours) < 0.03 * theirs:
        return "as fast as"
    return (
        f"{theirs / ours:.2f}x faster than"
        if ours < theirs
        else f"{ours / theirs:.2f}x SLOWER than"
    )


def timed(call: Call, device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
