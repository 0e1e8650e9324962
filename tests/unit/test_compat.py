"""What compat.py knows of other packages."""

from __future__ import annotations

import contextvars
import importlib.metadata
import threading

import pytest
import torch
import triton

from bla_inductor import compat


def test_tritons_version_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nightly builds of torch bring Triton in a package of another name."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(triton, "__version__", "3.7.0+git1234")
    compat.triton_version.cache_clear()
    try:
        assert compat.triton_version() == (3, 7)
        assert compat.pipelines_a_shared_operand()
        assert not compat.pipelines_inline_assembly()
    finally:
        compat.triton_version.cache_clear()


def test_threads_without_an_allocator_ask_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor sets at a kernel's first launch is set in one thread only."""
    from triton.runtime import _allocation

    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: asked.append((size, device)))

    def launch() -> object:
        return _allocation._allocator.get()(512, 128, None)

    assert compat.gives_kernels_memory()
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert asked == [(512, "cuda")]

    def launch_with_ones_own() -> object:
        triton.set_allocator(lambda size, alignment, stream: size + alignment)
        return launch()

    assert contextvars.copy_context().run(launch_with_ones_own) == 640
    assert len(asked) == 1


def test_another_triton_gives_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import _allocation

    monkeypatch.delattr(_allocation, "_NULL_ALLOCATOR")
    assert not compat.gives_kernels_memory.__wrapped__()
