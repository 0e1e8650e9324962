"""DDP and FSDP2 with two gloo processes on the CPU: gradients as without compilation."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bla_inductor.backend import bla

PROCESSES = 2
WIDTH, LAYERS = 192, 2  # 1.2 MB a layer: one bucket of DDP's each

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).sigmoid().chunk(3, -1)
        return x + self.out(q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6))


def ddp(model: nn.Module) -> nn.Module:
    """Dynamo's DDP pass gives the backend a graph for each bucket."""
    return DistributedDataParallel(model, bucket_cap_mb=1)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(run: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    found = {}
    for name, p in model.named_parameters():
        whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = whole.clone()
    return found


def train(rank: int, directory: str) -> None:
    """One process: the wrapped model with and without compilation, on data of its own."""
    path = pathlib.Path(directory)
    distributed.init_process_group(
        "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).double()
    x = torch.rand(PROCESSES, 2, 20, WIDTH).double()
    results = {}
    for wrap in (ddp, fsdp):
        torch._dynamo.reset()
        counters.clear()
        wrapped = wrap(copy.deepcopy(model))
        eager = gradients(wrapped, wrapped, x[rank])
        run = torch.compile(wrapped, backend=bla, options={"inner": "aot_eager"})
        compiled = gradients(run, wrapped, x[rank])
        results[wrap.__name__] = eager, compiled, dict(counters["bla"])
    torch.save(results, path / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("processes")
    mp.spawn(train, (str(directory),), nprocs=PROCESSES)
    return [torch.load(directory / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The gradients of one process that has all the data; both wrappers average over processes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).double()
    x = torch.rand(PROCESSES, 2, 20, WIDTH).double()
    found = gradients(model, model, x.flatten(0, 1))
    return {name: grad / PROCESSES for name, grad in found.items()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_and_matches(wrapper, results, alone) -> None:
    for result in results:
        eager, compiled, counted = result[wrapper]
        assert counted["matched"] == LAYERS
        assert counted["refused"] == 0
        torch.testing.assert_close(eager, alone)
        torch.testing.assert_close(compiled, alone)
