"""Importing is cheap, needs no triton, and is not needed at all to use the backend."""

from __future__ import annotations

import bla_inductor


def test_every_public_name_resolves():
    for name in bla_inductor.__all__:
        assert getattr(bla_inductor, name) is not None
        assert name in dir(bla_inductor)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(bla_inductor, "explian")


def test_submodules_do_not_hide_public_names():
    import bla_inductor.explainer
    import bla_inductor.report

    assert callable(bla_inductor.explain)
    assert isinstance(bla_inductor.Report, type)


def test_importing_the_package_imports_no_torch(run_python):
    run_python("""
        import sys
        import bla_inductor
        assert "torch" not in sys.modules
        assert "triton" not in sys.modules
        bla_inductor.Options, bla_inductor.BlaOptionError
        assert "torch" not in sys.modules
    """)


def test_torch_finds_the_backend_and_loads_it_late(run_python):
    run_python("""
        import sys
        import torch
        assert "bla" in torch.compiler.list_backends()
        assert "bla_inductor.backend" not in sys.modules
    """)


def test_without_triton(run_python):
    run_python("""
        import sys
        sys.modules["triton"] = None  # what an import of it then raises is ModuleNotFoundError
        import torch
        import bla_inductor.backend

        def attention(q, k, v):
            return q @ (k.mT @ v)

        q, k, v = torch.randn(3, 2, 4, 64, 8)
        for inner in ("aot_eager", "eager"):
            torch._dynamo.reset()
            run = torch.compile(attention, backend="bla", options={"inner": inner})
            torch.testing.assert_close(run(q, k, v), attention(q, k, v))
        assert not [name for name in sys.modules if name.startswith("triton.")]
    """)
