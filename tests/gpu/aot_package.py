"""`python -m tests.gpu.aot_package bla|plain FOLDER`: an AOTInductor package of an attention with a
symbolic length, rewritten or as it is, made, loaded, and compared with fp64 at two lengths.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.export import Dim, export

from bla_inductor import rewrite_exported
from tests.numerics import assert_within_budget


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def tensors(n: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))


def main(what: str, folder: Path) -> None:
    folder.mkdir()
    n = Dim("n", min=16, max=65536)
    shapes = {"q": {2: n}, "k": {2: n}, "v": {2: n}}
    program = export(Attention(), tensors(1024), dynamic_shapes=shapes)
    if what == "bla":
        program = rewrite_exported(program, {"strict": True})
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "package.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    for length in (1024, 700):
        args = tensors(length)
        exact = Attention()(*(x.double() for x in args))
        assert_within_budget("output", run(*args), Attention()(*args), exact)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
