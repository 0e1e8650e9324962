"""`explain`: the report alone, and nothing in the process is different afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters

import bla_inductor
from bla_inductor import explainer


def attention(q, k, v):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


class Block(nn.Module):
    def __init__(self, broken: bool = False):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.BatchNorm1d(256)
        self.broken = broken

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if self.broken:
            torch._dynamo.graph_break()
        return nn.functional.dropout(attention(q, k, v), 0.5, self.training)


@pytest.fixture
def x():
    return torch.rand(2, 256, 16)


def test_a_function_a_module_and_what_was_compiled_of_them(x):
    block = Block()
    q = x.clone()
    for model, args in (
        (attention, (q, q, q)),
        (torch.compile(attention, backend="eager"), (q, q, q)),
        (block, (x,)),
        (torch.compile(block, backend="eager"), (x,)),
    ):
        report = bla_inductor.explain(model, *args)
        assert len(report.matches) == 1
        assert report.matches[0].location.file == __file__
    in_place = Block()
    in_place.compile(backend="eager")
    assert len(bla_inductor.explain(in_place, x).matches) == 1


def test_keyword_arguments_are_passed(x):
    assert len(bla_inductor.explain(attention, x, v=x, k=x).matches) == 1


def test_nothing_is_compiled_and_nothing_counted(x):
    bla_inductor.explain(Block(), x)
    assert not counters["inductor"]
    assert not counters["aot_autograd"]
    assert not counters["bla"]


def test_the_graph_that_runs_is_the_users(x):
    """The result of the call is not returned, so look at it from inside."""
    seen = []

    def spy(q):
        out = attention(q, q, q)
        torch._dynamo.graph_break()
        seen.append(out)

    bla_inductor.explain(spy, x)
    assert torch.equal(seen[0], attention(x, x, x))


def test_state_is_put_back(x):
    block = Block().train()
    state = {name: value.clone() for name, value in block.state_dict().items()}
    random = torch.get_rng_state()
    bla_inductor.explain(torch.compile(block, backend="eager"), x)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
def test_what_was_compiled_stays_compiled(x, broken, isolate, monkeypatch):
    """More often than Dynamo's limit of 8 compilations a function."""
    if not isolate:  # as in a torch that cannot: there, graph breaks count towards the limit
        monkeypatch.setattr(explainer, "isolated", dict)
    compiled = 0

    def counting(gm, example_inputs):
        nonlocal compiled
        compiled += 1
        return gm.forward

    block = Block(broken).eval()
    run = torch.compile(block, backend=counting)
    run(x)
    before = compiled
    assert before == 1 + broken
    for _ in range(12 if explainer.isolated() or not broken else 3):
        assert len(bla_inductor.explain(block, x).matches) == 1
    run(x)
    assert compiled == before


@pytest.mark.parametrize("how", ["eager", "torch.compile", "Module.compile"])
def test_all_graphs_are_in_one_report(x, how):
    block = Block(broken=True)
    if how == "Module.compile":
        block.compile(backend="eager")
    model = torch.compile(block, backend="eager") if how == "torch.compile" else block
    report = bla_inductor.explain(model, x)
    assert report.graphs == 2
    assert len(report.matches) == 1


def test_a_function_compiled_with_a_graph_break(x):
    def broken(q):
        q = q.sin()
        torch._dynamo.graph_break()
        return attention(q, q, q)

    assert bla_inductor.explain(torch.compile(broken, backend="eager"), x).graphs == 2


def test_nested_graphs_are_copied():
    child = fx.symbolic_trace(lambda x: torch.sin(x))
    graph = fx.Graph()
    graph.output(graph.call_module("child", (graph.placeholder("x"),)))
    parent = fx.GraphModule({"child": child}, graph)
    twin = explainer.copy_graphs(parent)
    (sine,) = child.graph.find_nodes(op="call_function", target=torch.sin)
    sine.target = torch.cos
    child.recompile()
    assert parent(torch.zeros(())) == 1
    assert twin(torch.zeros(())) == 0


def test_the_environment_decides_the_options(x, monkeypatch):
    monkeypatch.setenv("BLA_REWRITE", "off")
    assert not bla_inductor.explain(attention, x, x, x).matches


def test_code_without_a_file_is_where_it_was_defined(x):
    """Torch keeps no line of what exec made: it is not where `explain` calls it."""
    names = {}
    exec("\n\ndef attention(q, k, v):\n    return q @ (k.mT @ v)\n", names)
    (match,) = bla_inductor.explain(names["attention"], x, x, x).matches
    assert str(match.location) == "<string>:3"
    module = nn.Module()
    module.forward = names["attention"]
    (match,) = bla_inductor.explain(module, x, x, x).matches
    assert str(match.location) == "<string>:3"


def test_a_call_without_a_graph_says_so(caplog):
    report = bla_inductor.explain(lambda: 3)
    assert report.graphs == 0
    assert "no graph of this call" in caplog.text


def test_errors_of_the_model_pass_through():
    with pytest.raises(RuntimeError, match="reduction dim"):
        bla_inductor.explain(torch.matmul, torch.ones(2, 3), torch.ones(2, 3))


def test_the_formula_tells_what_divides_from_what_multiplies(x):
    def scaled(q, k, v, a, b):
        return q @ ((k.mT @ v) * a / b)

    a, b = torch.rand(()), torch.rand(())
    (match,) = bla_inductor.explain(scaled, x, x, x, a, b).matches
    after = match.formula.partition(" × ")[2].split()[0]
    assert sorted(after.split("·")) == ["1/l_args_4_", "l_args_3_"]


def test_the_formula_tells_what_is_added_inside_a_divisor(x):
    def eps_on_the_keys(q, k, v):
        z = 1 / torch.einsum("bnc,bc->bn", q, k.sum(1) + 1e-3)
        state = torch.einsum("bmc,bmd->bcd", k, v)
        return torch.einsum("bnc,bcd,bn->bnd", q, state, z)

    (match,) = bla_inductor.explain(eps_on_the_keys, x, x.clone(), x.clone()).matches
    after = match.formula.partition(" × ")[2].partition("   with")[0]
    assert after == "1/(Σ l_args_0_·(Σ l_args_1_ + 0.001))"
