"""A process in which Triton interprets: it runs modules that Inductor wrote, one after the other.

`python -m tests.imagined.interpreter` is that process; the environment it needs must be set before
triton is imported, and where the modules are made Triton has to be the compiler's.
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Interpreter:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.imagined.interpreter"],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, code: str, args: Sequence[Any]) -> list[Any]:
        """The results of the module `code`, which may write to `args`."""
        sent = [a.detach() if isinstance(a, Tensor) else a for a in args]
        _send(self._process.stdin, (code, sent))
        error, results, after = _receive(self._process.stdout)
        if error:
            raise RuntimeError(error)
        owners: dict[int, Tensor] = {}
        for mine, its in zip(sent, after, strict=True):
            if isinstance(mine, Tensor):
                owners[its.untyped_storage()._cdata] = mine
                if not torch.equal(mine, its):
                    mine.copy_(its)
        return [_ours(result, owners) for result in results]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _ours(result: Any, owners: Mapping[int, Tensor]) -> Any:
    """A view of an argument there is one of the argument here."""
    owner = owners.get(result.untyped_storage()._cdata) if isinstance(result, Tensor) else None
    if owner is None:
        return result
    return owner.as_strided(result.shape, result.stride(), result.storage_offset())


def _send(stream: Any, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    stream.write(struct.pack("q", buffer.tell()) + buffer.getvalue())
    stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the other process ended")
    (size,) = struct.unpack("q", head)
    return torch.load(io.BytesIO(stream.read(size)), weights_only=False)


def _serve() -> None:
    from tests.compile import interpreted_graphs

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            code, args = _receive(source)
        except EOFError:
            return
        error, results = "", []
        try:
            results = interpreted_graphs.run(code, list(args))
        except Exception:
            error = traceback.format_exc()
        _send(sink, (error, results, args))


if __name__ == "__main__":
    _serve()
