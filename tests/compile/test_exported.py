"""Programs of torch.export: rewritten, still programs, and saved, loaded and compiled as such."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, export, unflatten
from torch.utils.checkpoint import checkpoint

from bla_inductor import (
    BlaNoMatchError,
    BlaOptionError,
    Report,
    backend,
    rewrite_exported,
    verify,
)
from tests.counted import counted
from tests.numerics import assert_within_budget

HEADS, WIDTH = 2, 16
OPERATOR = "bla.linear_attention.default"


def attention(q, k, v):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


class Attention(nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v)


class Block(nn.Module):
    """Parameters, a constant tensor, and coefficients that depend on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = Attention()
        self.gain = torch.full((WIDTH,), 2.0)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        out = self.attention(q, k, v / n).transpose(1, 2).reshape(b, n, c)
        return self.out(out * self.gain)


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(torch.rand(2, 3, 40, 8) for _ in range(3))


def sequence(n: int = 40) -> torch.Tensor:
    return torch.randn(2, n, WIDTH)


def operators(program: ExportedProgram) -> list[str]:
    modules = program.graph_module.modules()
    names = [str(n.target) for m in modules for n in m.graph.nodes if n.op == "call_function"]
    return [name for name in names if name.startswith("bla.")]


def report(program: ExportedProgram) -> Report:
    return program.graph_module.meta["bla_report"]


def loaded(program: ExportedProgram, directory) -> ExportedProgram:
    torch.export.save(program, directory / "saved.pt2")
    return torch.export.load(directory / "saved.pt2")


@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_result_is_a_program_that_computes_the_same(dynamic, decomposed, tmp_path) -> None:
    model = Block()
    shapes = ({1: Dim("n", min=4, max=512)},) if dynamic else None
    program = export(model, (sequence(),), dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    before = program.graph_module.code
    rewritten = rewrite_exported(program)
    assert program.graph_module.code == before
    assert operators(rewritten) == [OPERATOR]

    values = [n.meta["val"] for n in rewritten.graph.nodes if n.op != "output"]
    assert len({id(v.fake_mode) for v in values if isinstance(v, FakeTensor)}) == 1
    assert rewritten.range_constraints == program.range_constraints
    assert rewritten.state_dict is program.state_dict

    again = loaded(rewritten, tmp_path)
    for n in (40, 55) if dynamic else (40,):
        x = sequence(n)
        for made in (rewritten, again, rewritten.run_decompositions()):
            assert operators(made) == [OPERATOR]
            torch.testing.assert_close(made.module()(x), model(x))
    if dynamic:
        with pytest.raises(Exception, match="512"):
            rewritten.module()(sequence(600))


class NamedAsBuiltins(nn.Module):
    def forward(self, input, next):
        return attention(input, next, input)


def test_inputs_that_are_named_as_builtins_keep_their_names(tmp_path) -> None:
    x, y = tensors()[:2]
    program = export(NamedAsBuiltins(), (x, y))
    rewritten = rewrite_exported(program)
    assert operators(rewritten) == [OPERATOR]
    assert rewritten.graph_signature.user_inputs == program.graph_signature.user_inputs
    for made in (rewritten, loaded(rewritten, tmp_path), rewritten.run_decompositions()):
        torch.testing.assert_close(made.module()(x, y), attention(x, y, x))


class Masked(nn.Module):
    def forward(self, q, k, v):
        q, k = q.relu(), k.relu()
        out, z = q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)
        nothing = out.new_zeros(out.shape) + torch.zeros_like(out)
        return torch.where(z > 1e-6, out / (z + 1e-6), nothing)


def test_tensors_made_in_the_shape_of_the_numerator_do_not_read_it() -> None:
    inputs = tensors()
    rewritten = rewrite_exported(export(Masked(), inputs))
    (match,) = report(rewritten).matches
    assert "÷" in match.formula
    torch.testing.assert_close(rewritten.module()(*inputs), Masked()(*inputs))


def test_gradients() -> None:
    model, x = Block(), sequence()
    run = rewrite_exported(export(model, (x,))).module()
    ours = torch.autograd.grad(run(x).square().sum(), run.parameters())
    named = dict(model.named_parameters())
    theirs = torch.autograd.grad(
        model(x).square().sum(), [named[name] for name, _ in run.named_parameters()]
    )
    torch.testing.assert_close(ours, theirs)


def test_what_was_decided_is_told() -> None:
    program = export(Call(attention), tensors())
    rewritten = rewrite_exported(program)
    (match,) = report(rewritten).matches
    assert match.location.file == __file__
    assert counted() == {"graphs": 1, "matched": 1, "refused": 0}

    only_told = rewrite_exported(program, {"rewrite": "off"})
    assert operators(only_told) == []
    assert len(report(only_told).refusals) == 1
    assert "bla_report" not in program.graph_module.meta


def test_parameters_are_known_as_such() -> None:
    """x·A·B is a product of three matrices, but a projection when A and B are parameters."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.rand(3, 40, 8))
            self.register_buffer("b", torch.rand(3, 8, 40))

        def forward(self, x):
            return x @ (self.a @ self.b)

    x = torch.rand(3, 64, 40)
    rewritten = rewrite_exported(export(LowRank(), (x,)), {"rewrite": "always"})
    assert operators(rewritten) == []
    three = rewrite_exported(
        export(Call(lambda x, a, b: x @ (a @ b)), (x, *LowRank().state_dict().values())),
        {"rewrite": "always"},
    )
    assert operators(three) == [OPERATOR]


def test_strict_and_options_that_do_not_exist() -> None:
    program = export(Call(torch.sin), (torch.rand(3),))
    with pytest.raises(BlaNoMatchError):
        rewrite_exported(program, {"strict": True})
    with pytest.raises(BlaOptionError, match="did you mean 'strict'"):
        rewrite_exported(program, {"strct": True})
    with pytest.raises(BlaOptionError, match="max_autotune"):
        rewrite_exported(program, {"max_autotune": True})


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("verify", "first", r"bla_inductor\.verify\(program\.module\(\), \*args\)"),
        ("inner", "inductor", "where the result is compiled"),
        ("mode", "max-autotune", "aoti_compile_and_package"),
    ],
)
def test_options_for_torch_compile_say_what_to_do_instead(option, value, instead, monkeypatch):
    program = export(Call(attention), tensors())
    told = rf"^option {option}='{value}' is for torch\.compile\. .*{instead}.* strict, rewrite"
    with pytest.raises(BlaOptionError, match=told) as caught:
        rewrite_exported(program, {option: value})
    assert (caught.value.key, caught.value.got) == (option, value)
    assert operators(rewrite_exported(program, {"verify": None, "mode": None})) == [OPERATOR]
    monkeypatch.setenv(f"BLA_{option.upper()}", value)
    assert operators(rewrite_exported(program)) == [OPERATOR]


def test_what_to_do_instead_of_verify() -> None:
    found = verify(export(Call(attention), tensors()).module(), *tensors())
    assert found.check().comparisons
    assert len(found.report.matches) == 1


def test_an_approximation() -> None:
    softmax = Call(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)
    program = export(softmax, (torch.rand(1, 160, 8),) * 3)
    rewritten = rewrite_exported(program, {"approximate": {"pisa": {"block_size": 16}}})
    assert operators(rewritten) == ["bla.piecewise_sparse_attention.default"]


def test_a_failure_of_ours_leaves_the_program_as_it_was(monkeypatch, caplog) -> None:
    def broken(*_):
        raise ZeroDivisionError("a fault of ours")

    program = export(Call(attention), tensors())
    monkeypatch.setattr(backend, "rewrite", broken)
    assert rewrite_exported(program).graph_module.code == program.graph_module.code
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "a fault of ours" in warning.message
    with pytest.raises(ZeroDivisionError):
        rewrite_exported(program, {"strict": True})


def in_no_grad(q, k, v):
    with torch.no_grad():
        return attention(q, k, v)


def in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return attention(q, k, v)


def in_checkpoint(q, k, v):
    return checkpoint(attention, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("how", ["training", "decomposed", "loaded"])
@pytest.mark.parametrize("function", [in_no_grad, in_autocast, in_checkpoint])
def test_regions(function, how, tmp_path) -> None:
    args = tensors()
    program = export(Call(function), args)
    if how == "decomposed":
        program = program.run_decompositions()
    if how == "loaded":
        program = loaded(program, tmp_path)
    rewritten = rewrite_exported(program)
    assert operators(rewritten) == [OPERATOR]
    ours, eager = rewritten.module()(*args), function(*args)
    assert ours.dtype == eager.dtype
    assert_within_budget("output", ours, eager, attention(*(x.double() for x in args)))


def test_casts_of_an_autocast_region() -> None:
    """They are not in the graph: who reads it has to enter autocast, as the program does."""

    def product(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return q @ (k.mT @ v)

    args = tensors()
    rewritten = rewrite_exported(export(Call(product), args))
    assert [match.dtype for match in report(rewritten).matches] == ["bfloat16"]
    q, k, v = (x.double() for x in args)
    assert_within_budget("output", rewritten.module()(*args), product(*args), q @ (k.mT @ v))


def written_through_a_view(q, k, v):
    keys = k.clone()
    flat = keys.view(-1)
    state = keys.mT @ v
    flat.add_(1.0)
    return (q @ state) / (q @ keys.sum(-2).unsqueeze(-1) + 1e-6)


@pytest.mark.parametrize("from_a_file", [False, True])
def test_memory_that_is_written_through_a_view(from_a_file, tmp_path) -> None:
    """A program from a file does not record which of its tensors share memory."""
    args = tensors()
    program = export(Call(written_through_a_view), args)
    if from_a_file:
        program = loaded(program, tmp_path)
    rewritten = rewrite_exported(program, {"rewrite": "always"})
    torch.testing.assert_close(rewritten.module()(*args), written_through_a_view(*args))
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
def test_buffers_that_are_written_still_are(decomposed) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, q, k, v):
            self.calls.add_(1)
            return {"out": attention(q, k, v), "calls": self.calls + 0, "three": 3}

    args = tensors()
    program = export(Counting(), args)
    if decomposed:
        program = program.run_decompositions()
    rewritten = rewrite_exported(program)
    assert operators(rewritten) == [OPERATOR]
    run = rewritten.module()
    torch.testing.assert_close(run(*args)["out"], attention(*args))
    assert run(*args)["calls"] == 2


def test_submodules_keep_the_call_signature_that_the_user_preserved() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = Attention(), nn.Linear(8, 8)

        def forward(self, q, k, v):
            return self.out(self.attention(q, k, v))

    model, args = Model(), tensors()
    program = export(model, args, preserve_module_call_signature=("attention", "out"))
    before = str(program.module_call_graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewritten = rewrite_exported(program)
    assert str(program.module_call_graph) == before
    assert operators(rewritten) == [OPERATOR]
    again = unflatten(rewritten)
    torch.testing.assert_close(again(*args), model(*args))
    again.set_submodule("attention", Call(lambda q, k, v: v))
    torch.testing.assert_close(again(*args), model.out(args[2]))


def test_a_submodule_that_disappears_has_no_call_signature() -> None:
    """The operator computes what `attention` returned and the reshape after it."""
    model, x = Block(), sequence()
    program = export(model, (x,), preserve_module_call_signature=("attention", "out"))
    rewritten = rewrite_exported(program)
    kept = {e.fqn for e in rewritten.module_call_graph if e.signature is not None}
    assert kept == {"", "out"}
    torch.testing.assert_close(unflatten(rewritten)(x), model(x))


@pytest.mark.slow
def test_a_package_of_aot_inductor_needs_nothing_of_bla(tmp_path, run_python) -> None:
    """The package runs where bla is not imported; the program itself says what it needs."""
    model, x = Block(), sequence(55)
    shapes = ({1: Dim("n", min=4, max=512)},)
    rewritten = rewrite_exported(export(model, (sequence(),), dynamic_shapes=shapes))
    torch.export.save(rewritten, tmp_path / "saved.pt2")
    fast_to_compile = {
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    torch._inductor.aoti_compile_and_package(
        rewritten, package_path=str(tmp_path / "package.pt2"), inductor_configs=fast_to_compile
    )
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    run_python(f"""
        import pathlib, sys
        import torch
        here = pathlib.Path({str(tmp_path)!r})
        x, expected = torch.load(here / "expected.pt")
        run = torch._inductor.aoti_load_package(str(here / "package.pt2"))
        torch.testing.assert_close(run(x), expected)
        try:
            torch.export.load(here / "saved.pt2")
        except Exception:
            pass
        else:
            raise AssertionError("the operator should have been unknown")
        assert "bla_inductor" not in sys.modules
        import bla_inductor.exported
        run = torch.export.load(here / "saved.pt2").module()
        torch.testing.assert_close(run(x), expected)
    """)
