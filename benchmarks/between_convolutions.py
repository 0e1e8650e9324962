"""Attention with features before tokens, between 1 × 1 convolutions: `python
benchmarks/between_convolutions.py [--dtype float32] [--side 64]`.

Inductor's time over that of bla with `rewrite="always"`, for the spellings that cost.py decides
about: which feature maps, with or without a normaliser, on images, after a grouped convolution
(Inductor then trains with channels first), and with conv1d. Results as CSV on the standard output.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from bla_inductor.bench import measure

Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

CHANNELS, BATCH = 256, 8
MAPS: dict[str, Maps] = {
    "none": (lambda q: q, lambda k: k),
    "elu + 1": (lambda q: F.elu(q) + 1, lambda k: F.elu(k) + 1),
    "softmax of k": (lambda q: q, lambda k: k.softmax(3)),
    "softmax of q and k": (lambda q: q.softmax(2), lambda k: k.softmax(3)),
}
AFTER = ("", "grouped", "conv1d")


class Attention(nn.Module):
    """x (B, C, H, W)."""

    def __init__(self, maps: Maps, normalised: bool, after: str, dim: int) -> None:
        super().__init__()
        self.maps, self.normalised, self.dim = maps, normalised, dim
        kind: Any = nn.Conv1d if after == "conv1d" else nn.Conv2d
        self.first: nn.Module = nn.Flatten(2) if after == "conv1d" else nn.Identity()
        if after == "grouped":
            self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=8)
        self.qkv = kind(CHANNELS, 3 * CHANNELS, 1, bias=False)
        self.out = kind(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = self.first(x)
        parts = self.qkv(image).chunk(3, 1)
        q, k, v = (t.unflatten(1, (-1, self.dim)).flatten(3) for t in parts)
        q, k = self.maps[0](q), self.maps[1](k)
        out = (v @ k.mT) @ q
        if self.normalised:
            out = out / (k.sum(3).unsqueeze(2) @ q + 1e-6)
        return self.out(out.reshape(image.shape)).view(x.shape)


def milliseconds(model: nn.Module, x: Tensor, training: bool, **backend: Any) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(model, **backend)
    incoming = torch.randn_like(x)
    leaves = [*model.parameters(), x]

    def step() -> object:
        if training:
            return torch.autograd.grad(compiled(x), leaves, incoming)
        with torch.no_grad():
            return compiled(x)

    return measure.milliseconds(step, x.device.type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--only", default="", help="feature maps whose name contains this")
    parser.add_argument("--after", nargs="*", choices=AFTER, default=AFTER, help="what is before")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    print("phi,normalised,after,D,side,dtype,run,inductor_ms,bla_ms,inductor_ratio")
    spellings = itertools.product(MAPS, (False, True), given.after, given.dims, (False, True))
    for name, normalised, after, dim, training in spellings:
        if given.only not in name or (normalised and name != "elu + 1"):
            continue
        torch.manual_seed(0)
        model = Attention(MAPS[name], normalised, after, dim)
        model = model.to(given.device, getattr(torch, given.dtype))
        x = torch.randn(BATCH, CHANNELS, given.side, given.side).to(next(model.parameters()))
        x = x.detach().requires_grad_()
        theirs = milliseconds(model, x, training, backend="inductor")
        ours = milliseconds(model, x, training, backend="bla", options={"rewrite": "always"})
        what = name, "yes" if normalised else "no", after, dim, given.side, given.dtype
        run = "training step" if training else "inference"
        print(*what, run, f"{theirs:.4g},{ours:.4g},{theirs / ours:.2f}", sep=",", flush=True)


if __name__ == "__main__":
    main()
