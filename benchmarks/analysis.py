"""What the analysis costs at compile time: `python benchmarks/analysis.py [NAME ...]`.

For every model of tests/models/table.py whose package is installed, and for a diffusers UNet with
LinFusion, with static and with symbolic sizes: the milliseconds of `rewrite` per node of the Dynamo
graph, the first time in the process and the best of several, and its share of the compilation that
it is a part of. The share is told for the inner compiler that --inner names: "aot_eager" makes it
look worst. Times are CPU time of the thread. --profile prints where it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pathlib
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from bla_inductor.backend import inner_compiler  # noqa: E402
from bla_inductor.options import Options  # noqa: E402
from bla_inductor.rewrite import rewrite  # noqa: E402

Inputs = Callable[[], tuple[list[Tensor], dict[str, Any]]]


@dataclass
class Cost:
    """Of one compilation: seconds are of CPU time."""

    nodes: int = 0
    matches: int = 0
    analysis: float = 0.0
    total: float = 0.0

    @property
    def per_node(self) -> float:
        """Milliseconds."""
        return 1e3 * self.analysis / self.nodes


def cost_of(
    model: nn.Module,
    inputs: tuple[list[Tensor], dict[str, Any]],
    *,
    dynamic: bool,
    inner: str,
    profile: cProfile.Profile | None = None,
) -> Cost:
    """Compile `model` from nothing and run it once."""
    cost = Cost()
    options, for_inductor = Options.parse({"inner": inner})
    compile_inner = inner_compiler(options, for_inductor, None)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        cost.nodes += len(gm.graph.nodes)
        with profile or contextlib.nullcontext():
            start = time.thread_time()
            report = rewrite(gm, example_inputs, options)
            cost.analysis += time.thread_time() - start
        cost.matches += len(report.matches)
        return compile_inner(gm, example_inputs)

    torch._dynamo.reset()
    tensors, others = inputs
    start = time.thread_time()
    torch.compile(model, backend=backend, dynamic=dynamic)(*tensors, **others)
    cost.total = time.thread_time() - start
    return cost


def linfusion_unet() -> nn.Module:
    """Eleven self-attentions in the layout of Stable Diffusion 1.5, narrow."""
    from diffusers import UNet2DConditionModel
    from zoo.linfusion import construct_for

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    construct_for(unet)
    return unet


def unet_inputs() -> tuple[list[Tensor], dict[str, Any]]:
    others = {"encoder_hidden_states": torch.randn(2, 5, 16), "return_dict": False}
    return [torch.randn(2, 4, 16, 16), torch.tensor(3)], others


def models() -> Iterator[tuple[str, Callable[[], nn.Module], Inputs]]:
    from tests.models.table import MODELS

    for row in MODELS:
        if row.installed:
            yield row.name, row.make, row.inputs
    yield "diffusers UNet2DConditionModel, LinFusion", linfusion_unet, unet_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models whose name contains one of these")
    parser.add_argument("--inner", default="aot_eager", help="the inner compiler")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    arguments = parser.parse_args()
    print(f"| {'model':<52} | sizes   | nodes | found | first ms/node | best ms/node | share |")
    print(f"|{'-' * 54}|---------|------:|------:|--------------:|-------------:|------:|")
    for name, make, inputs in models():
        if arguments.names and not any(part in name for part in arguments.names):
            continue
        for dynamic in (False, True):
            torch.manual_seed(0)
            model, given = make(), inputs()
            runs = range(arguments.runs)
            costs = [cost_of(model, given, dynamic=dynamic, inner=arguments.inner) for _ in runs]
            best = min(costs, key=lambda c: c.analysis)
            print(
                f"| {name:<52} | {'dynamic' if dynamic else 'static ':7} | {best.nodes:5} "
                f"| {best.matches:5} | {costs[0].per_node:13.2f} | {best.per_node:12.2f} "
                f"| {best.analysis / best.total:5.1%} |",
                flush=True,
            )
            if arguments.profile:
                profile = cProfile.Profile()
                cost_of(model, given, dynamic=dynamic, inner=arguments.inner, profile=profile)
                pstats.Stats(profile).sort_stats("cumtime").print_stats(arguments.profile)


if __name__ == "__main__":
    main()
