"""The rewrite inside a model: mutation, escapes, sizes, layouts."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import bla_inductor
from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite
from tests.compile.rewriting import SHAPE, Graphs, attention, compiled, matched, tensors
from tests.numerics import assert_no_less_accurate


def test_a_leaf_modified_after_it_was_read_is_refused() -> None:
    def model(q, k, v):
        q = F.relu(q)
        scores = q @ k.mT
        q.mul_(3.0)
        return scores @ v + q

    args = tensors(grad=False)
    torch.testing.assert_close(compiled(model)(*args), model(*args))
    assert matched() == 0
    torch._dynamo.reset()
    (refusal,) = bla_inductor.explain(model, *args).refusals
    assert "modified in place" in refusal.reason
    assert "out of place" in refusal.reason


def test_a_leaf_modified_before_it_was_read_is_read_after_it() -> None:
    def model(q, k, v):
        q = torch.sin(q)
        q.add_(1.0)
        return q @ (k.mT @ v)

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_a_result_modified_later_through_its_base() -> None:
    def model(q, k, v):
        out = q @ (k.mT @ v)
        view = out.transpose(1, 2)
        out.add_(1.0)
        return view * 2

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_intermediates_that_are_used_elsewhere_are_kept() -> None:
    def model(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.mT @ v
        z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
        return q @ state / z + state.sum() + z

    assert_no_less_accurate(compiled(model), model, tensors())
    assert matched() == 1


def test_dead_code_is_gone() -> None:
    graphs = Graphs()
    torch.compile(attention, backend=graphs)(*tensors())
    targets = graphs.targets()
    assert sum("bla.linear_attention" in t for t in targets) == 1
    assert not any("matmul" in t or "truediv" in t or t == "sum" for t in targets)


def test_new_nodes_keep_the_users_line_and_what_the_cache_needs() -> None:
    graphs = Graphs()
    torch.compile(attention, backend=graphs)(*tensors())
    (gm,) = graphs.modules
    (node,) = [n for n in gm.graph.nodes if n.target is torch.ops.bla.linear_attention.default]
    assert attention.__code__.co_filename in node.meta["stack_trace"]
    new = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert all("example_value" in n.meta for n in new)


def test_one_compilation_for_all_lengths() -> None:
    """Sizes stay symbolic: no guard on them, and 1/n stays 1/n."""

    def model(q, k, v):
        q, k = F.relu(q), F.relu(k)
        z = 1 / (q @ k.mean(-2, keepdim=True).mT + 1e-6)
        n = k.shape[-2]
        return (q @ ((k.mT * n**-0.5) @ (v * n**-0.5)) * z).transpose(1, 2).flatten(2)

    graphs = Graphs()
    counter = CompileCounterWithBackend("eager")

    def backend(gm, inputs):
        graphs(gm, inputs)
        return counter(gm, inputs)

    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for n in (20, 33, 64, 7):
        assert_no_less_accurate(run, model, tensors(*[(2, 3, n, 8)] * 3))
    assert len(graphs.report.matches) == counter.frame_count
    # fp32 and the fp64 reference of `run` itself never meet: one compilation serves every length
    assert counter.frame_count == 1
    assert "1/s" in graphs.report.matches[0].formula


def test_sizes_become_symbolic_on_their_own() -> None:
    """The second length makes the size symbolic, without dynamic=True; the third is free."""
    graphs = Graphs()
    run = torch.compile(attention, backend=graphs, fullgraph=True)
    for n in (20, 33, 64, 7):
        args = tensors(*[(2, 3, n, 8)] * 3)
        torch.testing.assert_close(run(*args), attention(*args))
    assert len(graphs.modules) == 2


def test_operands_are_not_reshaped_for_axes_that_only_the_result_splits() -> None:
    """Tokens that leave as an image: q has the same rows as before, in one dim."""

    def model(x):
        q, k, v = x.reshape(2, 3, 24, 20).mT.chunk(3, -1)
        q, k = q.relu(), k.relu()
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return out.mT.reshape(2, 24, 4, 5)

    args = tensors((2, 72, 4, 5), grad=False)
    graphs = Graphs()
    ours = torch.compile(model, backend=graphs)(*args)
    torch.testing.assert_close(ours, model(*args))
    (gm,) = graphs.modules
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.bla.linear_attention.default)
    assert {operand.target for operand in node.args[:3]} == {operator.getitem}


def test_the_operator_writes_the_layout_that_is_read() -> None:
    """transpose + reshape after it are views: the graph holds no copy, not even `contiguous`."""

    def model(q, k, v):
        q = (F.elu(q) + 1).transpose(1, 2).contiguous()
        k, v = (F.elu(k) + 1).transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return out.transpose(1, 2).reshape(2, 20, 24)

    args = tensors(*[(2, 20, 3, 8)] * 3, grad=False)
    graphs = Graphs()
    ours = torch.compile(model, backend=graphs)(*args)
    torch.testing.assert_close(ours, model(*args))
    (gm,) = graphs.modules
    copies = []

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
                copies.append(func)
            return func(*args, **(kwargs or {}))

    with Copies():
        gm(*args)
    assert copies == []


def test_strides_of_the_result_are_the_users() -> None:
    def model(q, k, v):
        return (q @ (k.mT @ v)).transpose(1, 2)

    args = tensors(grad=False)
    assert compiled(model)(*args).stride() == model(*args).stride()
    assert matched() == 1


def test_rewrite_off_only_reports() -> None:
    args = tensors(grad=False)
    graphs = Graphs()

    def backend(gm, inputs):
        graphs.report += rewrite(gm, inputs, Options(rewrite="off"))
        graphs.modules.append(gm)
        return gm.forward

    torch.testing.assert_close(torch.compile(attention, backend=backend)(*args), attention(*args))
    assert not any("bla" in t for t in graphs.targets())
    assert not graphs.report.matches


def test_transforms_of_torch_func_are_refused() -> None:
    args = tensors(grad=False)

    def model(q, k, v):
        return torch.vmap(attention)(q, k, v)

    torch.testing.assert_close(compiled(model)(*args), model(*args))
    assert matched() == 0
    torch._dynamo.reset()
    (refusal,) = bla_inductor.explain(model, *args).refusals
    assert "torch.func" in refusal.reason


def test_the_report_names_the_line() -> None:
    (match,) = bla_inductor.explain(attention, *tensors()).matches
    assert match.location.file == attention.__code__.co_filename
    assert "k.sum(-2)" in match.location.code
    assert "÷" in match.formula
    assert "N=20" in match.sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype) -> None:
    args = [torch.randn(SHAPE).to(dtype).requires_grad_() for _ in range(3)]
    assert_no_less_accurate(compiled(attention), attention, args)
    assert matched() == 1


def test_the_users_fp32_upcast_is_honoured() -> None:
    """bf16 in, bf16 out, products in fp32: rounding the state to bf16 would be seen."""

    def model(q, k, v):
        q, k, v = F.relu(q).float(), F.relu(k).float(), v.float()
        out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-15)
        return out.bfloat16()

    def exact(q, k, v):
        q, k = F.relu(q), F.relu(k)
        return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-15)

    args = [torch.randn(2, 3, 64, 16).bfloat16() for _ in range(3)]
    graphs = Graphs()
    ours = torch.compile(model, backend=graphs)(*args)
    truth = exact(*(x.double() for x in args))
    assert (ours - truth).norm() <= 1.01 * (model(*args) - truth).norm()
    (gm,) = graphs.modules
    (node,) = [n for n in gm.graph.nodes if n.target is torch.ops.bla.linear_attention.default]
    assert all(n.meta["example_value"].dtype == torch.bfloat16 for n in node.args)
    assert node.kwargs["upcast"] is True


def test_a_failing_emission_leaves_the_graph_as_it_was(monkeypatch) -> None:
    from bla_inductor import emit

    real = emit.Emitter.call

    def fails(self, target, *args, **kwargs):
        if target is torch.ops.bla.linear_attention.default:
            raise RuntimeError("injected")
        return real(self, target, *args, **kwargs)

    monkeypatch.setattr(emit.Emitter, "call", fails)

    def model(q, k, v):
        return attention(*(x.transpose(1, 2) for x in (q, k, v)))

    args = tensors((2, 20, 3, 8), (2, 20, 3, 8), (2, 20, 3, 8), grad=False)
    torch.testing.assert_close(compiled(model)(*args), model(*args))
    assert matched() == 0
