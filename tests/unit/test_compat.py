"""What compat.py knows of other packages."""

from __future__ import annotations

import importlib.metadata

import pytest
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
