"""`python -m tests.imagined.models [PART…]`: what models with these parts in their names, or all of
tests/models and of `bench models`, are compiled to for the imagined GPU, by Inductor and by bla
with `rewrite="always"`. Nothing runs; all of them take half an hour.

A line has, for Inductor and for bla: kernels (GEMMs and convolutions included) and the KB of the
buffers that they write; and of bla's kernels the templates, and the operator's calls. "more" marks
what is to be looked at: many sizes here are tiny, where a state is as large as what it sums.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

from tests.imagined import device

_BUFFER = re.compile(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)")


class _Compiled(BaseException):
    """Instead of a run: no handler of the compiler's may take it for a failure."""


@dataclass(frozen=True)
class Code:
    kernels: int
    templates: int
    calls: int
    kilobytes: float

    @classmethod
    def of(cls, modules: Sequence[str]) -> Code:
        import torch

        text = "".join(code[code.index("def call(") :] for code in modules)
        templates = len(re.findall(r"triton_tem_\w+\.run\(", text))
        loops = len(re.findall(r"triton_\w+\.run\(", text)) - templates
        written = sum(
            prod(map(int, re.findall(r"\d+", sizes))) * getattr(torch, dtype).itemsize
            for sizes, dtype in _BUFFER.findall(text)
        )
        outside = len(re.findall(r"extern_kernels\.\w+\(", text))
        calls = len(re.findall(r"torch\.ops\.bla\.", text))
        return cls(loops + templates + outside, templates, calls, written / 1e3)


def compiled(make: Any, training: bool) -> Iterator[Code]:
    """What Inductor makes of a model, then bla. make: it, its inputs and keyword arguments."""
    import torch
    from torch import Tensor, nn
    from torch._functorch import config as functorch

    from bla_inductor import select
    from bla_inductor.cost import Decision
    from tests.imagined.session import Session

    class WithOthers(nn.Module):
        """Tensors among the keyword arguments are on the imagined GPU as well."""

        def __init__(self, model: nn.Module, others: dict[str, Any]) -> None:
            super().__init__()
            self.model, self.others = model, others
            for name, x in others.items():
                if isinstance(x, Tensor):
                    self.register_buffer(f"given_{name}", x)

        def forward(self, *inputs: Tensor) -> Any:
            given = {n: getattr(self, f"given_{n}", x) for n, x in self.others.items()}
            return self.model(*inputs, **given)

    def half(x: Tensor) -> Tensor:
        return x.half().requires_grad_(training) if x.is_floating_point() else x

    def stop(*_: Any) -> None:
        raise _Compiled

    def none(_: Any) -> Decision:
        return Decision(False, "Inductor alone")

    model, inputs, others = make()
    module, tensors = WithOthers(model, others).half().train(training), [half(x) for x in inputs]
    for decide in (none, select.decide):
        session = Session()
        with (
            mock.patch.object(select, "decide", decide),
            mock.patch.object(session, "_run", stop),
            functorch.patch(force_non_lazy_backward_lowering=True),
            torch.set_grad_enabled(training),
        ):
            options = {} if decide is none else {"rewrite": "always"}
            try:
                with session.compiled(module, tensors, **options):
                    pass
            except _Compiled:
                pass
        yield Code.of(session.modules)
        session.close()


def models() -> Iterator[tuple[str, Any]]:
    from bla_inductor.bench import model_cases
    from tests.models.table import MODELS

    for row in MODELS:
        if row.installed:
            yield row.name, lambda row=row: (row.make(), *row.inputs())
    for model in model_cases.MODELS:
        yield f"{model.name} N{model.N}", model.make


def main(parts: Sequence[str]) -> int:
    device.imagine()
    for name, make in models():
        if parts and not any(part.lower() in name.lower() for part in parts):
            continue
        for training in (False, True):
            run = f"{name}, {'training' if training else 'inference'}"
            try:
                before, after = compiled(make, training)
            except Exception as error:
                print(f"{run}: {str(error).strip().partition(chr(10))[0][:80]}", flush=True)
                continue
            more = after.kernels > before.kernels or after.kilobytes > before.kilobytes
            print(
                f"{run}: kernels {before.kernels}, {after.kernels} ({after.templates} templates, "
                f"{after.calls} calls); KB {before.kilobytes:.1f}, {after.kilobytes:.1f}"
                + " more"
                * (more or after.calls > 0),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
