"""What moves into the operator: feature maps and key weights; and what stays outside, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bla_inductor.options import Options
from bla_inductor.rewrite import rewrite
from tests.numerics import assert_no_less_accurate

SHAPE = (2, 3, 24, 8)
EPS = 1e-6


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + EPS)


class WithValues(fx.Interpreter):
    """Notes what nodes are, as Dynamo does; all differentiated or none."""

    training = False

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        noted = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(self.training), result)
        n.meta["example_value"] = noted
        return result


class Rewritten:
    """A backend that rewrites and runs the graph as it is then; the operator's call is kept."""

    def __init__(self) -> None:
        self.report = None

    def __call__(self, gm, inputs):
        self.report = rewrite(gm, inputs, Options(rewrite="always"))
        calls = [n for n in gm.graph.nodes if n.target is torch.ops.bla.linear_attention.default]
        assert len(calls) == 1, self.report
        (self.call,) = calls
        self.targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
        return gm.forward

    def argument(self, name: str) -> Tensor:
        names = [a.name for a in self.call.target._schema.arguments]
        position = names.index(name)
        given = self.call.args
        node = given[position] if position < len(given) else self.call.kwargs.get(name)
        return None if node is None else node.meta["example_value"]

    def maps(self) -> dict[str, str]:
        return {k: v for k, v in self.call.kwargs.items() if k.endswith("_map")}


def run(function, inputs, *, check=True, **kwargs) -> Rewritten:
    backend = Rewritten()
    ours = torch.compile(function, backend=backend, fullgraph=True)
    if check:
        assert_no_less_accurate(ours, function, inputs, **kwargs)
        torch._dynamo.reset()  # that was fp64 at last: once more for the dtypes of the inputs
        backend = Rewritten()
        ours = torch.compile(function, backend=backend, fullgraph=True)
    ours(*inputs)
    return backend


def tensors(*shapes, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(s).to(dtype).requires_grad_() for s in (shapes or (SHAPE, SHAPE, SHAPE))]


def weights(*shapes) -> list[Tensor]:
    """Positive, so that the normaliser is far from zero."""
    return [(torch.rand(s) + 0.1).requires_grad_() for s in shapes]


FEATURE_MAPS = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu+eps": lambda x: F.relu(x) + 1e-3,
    "silu": F.silu,
    "exp": lambda x: torch.exp(x * 0.5),
    "square": lambda x: x.square(),
    "softmax": lambda x: x.softmax(-1),
    "normalized": lambda x: F.normalize(F.relu(x), dim=-1) + 1e-2,
}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_move_in(name) -> None:
    phi = FEATURE_MAPS[name]
    made = run(lambda q, k, v: attention(phi(q), phi(k), v), tensors(), roundings=8.0)
    assert set(made.maps()) == {"q_map", "k_map"}
    assert made.targets == ["bla.linear_attention.default"]


def test_each_side_has_its_own() -> None:
    def model(q, k, v):
        return attention(q.softmax(-1), torch.exp(k), v)

    maps = run(model, tensors()).maps()
    assert maps["q_map"] == "softmax"
    assert maps["k_map"] == "exp(x)"


def test_a_feature_map_that_others_read_stays_outside() -> None:
    def model(q, k, v):
        features = F.elu(q) + 1
        return attention(features, F.elu(k) + 1, v) + features

    made = run(model, tensors())
    assert set(made.maps()) == {"k_map"}


def test_decoupled() -> None:
    """The numerator reads turned features, the normaliser the plain ones: those stay alive."""

    def model(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        turned_q, turned_k = q.roll(1, -1) * 0.5 + q, k.roll(1, -1) * 0.5 + k
        return turned_q @ (turned_k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + EPS)

    made = run(model, tensors())
    assert made.maps() == {}
    assert made.argument("q_norm") is not None


def test_a_narrowing_cast_before_the_product_stays_outside() -> None:
    """Rounding before φ is not rounding after φ."""

    def model(q, k, v):
        q, k = torch.exp(q).bfloat16(), torch.exp(k).bfloat16()
        return attention(q, k, v.bfloat16())

    made = run(model, tensors(), check=False)
    assert made.maps() == {}
    assert made.argument("q").dtype == torch.bfloat16


def test_an_exact_map_keeps_the_narrow_tensor() -> None:
    """relu of a 16-bit number has 16 bits: the fp32 copies of q, k, v are not needed."""

    def model(q, k, v):
        q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
        return attention(q, k, v).to(torch.bfloat16)

    made = run(model, tensors(dtype=torch.bfloat16), check=False)
    assert set(made.maps()) == {"q_map", "k_map"}
    assert made.argument("k").dtype == torch.bfloat16
    assert made.call.kwargs["upcast"] is True


def test_another_map_in_float32_stays_in_float32() -> None:
    def model(q, k, v):
        return attention(torch.exp(q.float()), torch.exp(k.float()), v.float())

    made = run(model, tensors(dtype=torch.bfloat16), check=False)
    assert made.argument("k").dtype == torch.float32


def test_autocast() -> None:
    """exp runs in fp32 under autocast, of bf16 tensors, and is rounded for the product."""

    def model(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            q, k = torch.exp(q), torch.exp(k)
            return q @ (k.mT @ v)

    made = run(
        model, tensors((2, 24, 4), (2, 24, 4), (2, 24, 4), dtype=torch.bfloat16), check=False
    )
    assert set(made.maps()) == {"q_map", "k_map"}
    assert made.argument("k").dtype == torch.bfloat16


def test_a_map_without_a_value_at_zero_stays_outside() -> None:
    """The kernels fill their tiles up with zeros."""

    def model(q, k, v):
        return attention(torch.rsqrt(q), torch.rsqrt(k), v)

    assert run(model, [x.abs().detach() + 1 for x in tensors()], check=False).maps() == {}


def test_in_place_before() -> None:
    """φ cannot be moved behind a write to what it was of."""

    def model(q, k, v):
        features = F.elu(q) + 1
        q.mul_(2)
        return attention(features, F.elu(k) + 1, v) + q

    made = Rewritten()
    inputs = [x.detach() for x in tensors()]
    expected = model(*[x.clone() for x in inputs])
    got = torch.compile(model, backend=made, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_key_weights_move_in(kind) -> None:
    mask = torch.rand(2, 24) > 0.3
    weight = mask if kind == "bool" else (mask * torch.rand(2, 24)).requires_grad_()

    def model(q, k, v, w):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return attention(q, k * w[:, None, :, None], v)

    made = run(model, [*tensors(), weight], check=kind == "float")
    assert made.argument("key_weight").shape == (2, 1, 24)
    assert set(made.maps()) == {"q_map", "k_map"}
    assert "w[b,m]" in str(made.report)


def test_a_weight_of_keys_that_are_a_product_stays_with_them() -> None:
    """As in FLatten, with norms over all heads: one factor more costs nothing there."""

    def focused(x):
        x = F.relu(x) + EPS
        cubes = x**3
        return cubes / cubes.norm(dim=(1, 3), keepdim=True) * x.norm(dim=(1, 3), keepdim=True)

    made = run(lambda q, k, v: attention(focused(q), focused(k), v), tensors())
    assert made.argument("key_weight") is None
    assert made.maps() == {}
    assert made.targets.count("<built-in function mul>") == 2


def test_two_key_weights_are_one() -> None:
    def model(q, k, v, a, b):
        k = (F.elu(k) + 1) * a[:, None, :, None] * b[None, :, :, None]
        return attention(F.elu(q) + 1, k, v)

    made = run(model, [*tensors(), *weights((2, 24), (3, 24))])
    assert made.argument("key_weight").shape == (2, 3, 24)


def test_a_weight_on_the_values_alone_is_no_key_weight() -> None:
    def model(q, k, v, w):
        return attention(F.elu(q) + 1, F.elu(k) + 1, v * w[:, None, :, None])

    made = run(model, [*tensors(), *weights((2, 24))])
    assert made.argument("key_weight") is None
    assert set(made.maps()) == {"q_map", "k_map"}


def test_dynamic_sizes() -> None:
    def model(q, k, v):
        return attention(F.elu(q) + 1, F.elu(k) + 1, v)

    backend = Rewritten()
    ours = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for n in (24, 31):
        q, k, v = tensors(*((2, 3, n, 8),) * 3)
        torch.testing.assert_close(ours(q, k, v), model(q, k, v))
    assert set(backend.maps()) == {"q_map", "k_map"}


@pytest.mark.parametrize("training", [False, True])
def test_what_a_gpu_could_not_read_wide_is_copied_in_the_graph(training: bool) -> None:
    """Channels before pixels: one copy for both directions, where there are two; else Inductor
    decides later. Fake tensors need no GPU.
    """

    def model(x):
        q, k, v = x.chunk(3, 1)
        q, k, v = (t.unflatten(1, (4, 32)).transpose(-1, -2) for t in (q, k, v))
        return attention(q.relu(), k.relu(), v)

    with FakeTensorMode():
        image = torch.empty(2, 384, 256, device="cuda", dtype=torch.bfloat16)
        result = torch.empty(2, 4, 256, 32, device="cuda", dtype=torch.bfloat16)
    graph = fx.symbolic_trace(model)
    (x,) = graph.graph.find_nodes(op="placeholder")
    (output,) = graph.graph.find_nodes(op="output")
    x.meta["example_value"] = image.requires_grad_(training)
    output.args[0].meta["example_value"] = result.requires_grad_(training)
    report = rewrite(graph, [image], Options(rewrite="always"))
    assert len(report.matches) == 1
    targets = [str(n.target) for n in graph.graph.nodes]
    assert targets.count("aten.clone.default") == (3 if training else 0)
    (output,) = graph.graph.find_nodes(op="output")
    assert output.args[0].target is torch.ops.bla.linear_attention.default


def test_many_copies_of_inputs_do_not_pay() -> None:
    def model(q, k, v, q_norm, k_norm):
        q, k, v, q_norm, k_norm = (x.mT for x in (q, k, v, q_norm, k_norm))
        z = q_norm @ k_norm.sum(-2).unsqueeze(-1) + 1e-6
        return q @ (k.mT @ v) / z

    with FakeTensorMode():
        inputs = [torch.empty(2, 4, 32, 256, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    graph = fx.symbolic_trace(model)
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["example_value"] = value
    report = rewrite(graph, inputs, Options())
    assert not report.matches
    assert any(r.reason.startswith("5 of its tensors") for r in report.refusals)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("first", "rotated"), [("channels", True), ("channels", False), ("tokens", True)]
)
def test_what_loops_compute_is_no_copy_more(first: str, rotated: bool, training: bool) -> None:
    """RALA's layout: q' and k' beside q and k, all with channels before pixels. Inductor writes
    them as the kernels read them; v is a view of the input.
    """

    def model(x, cos):
        if first == "channels":
            q, k, v = x.chunk(3, 1)
            q, k, v = (t.unflatten(1, (4, 32)).transpose(-1, -2) for t in (q, k, v))
        else:
            q, k, v = x.chunk(3, 2)
            q, k, v = (t.unflatten(2, (4, 32)).transpose(1, 2) for t in (q, k, v))
        q, k = q.relu(), k.relu()
        z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
        if rotated:
            q, k = q * cos, k * cos
        return q @ (k.mT @ v) / z

    with FakeTensorMode():
        shape = (2, 384, 256) if first == "channels" else (2, 256, 384)
        image = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        cos = torch.empty(256, 32, device="cuda", dtype=torch.bfloat16)
        image.requires_grad_(training)
    graph = fx.symbolic_trace(model)
    values = WithValues(graph)
    values.training = training
    with image.fake_mode, torch.no_grad():
        values.run(image, cos)
    report = rewrite(graph, [image, cos], Options())
    assert len(report.matches) == 1
    assert not report.refusals
