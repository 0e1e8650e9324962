"""Nodes told by what torch recorded of them, against the same graphs run for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bla_inductor.algebra import Observation, Read, Value, observe
from bla_inductor.algebra.observe import Reshaped
from bla_inductor.algebra.observer import Observer
from bla_inductor.algebra.standin import stand_in

aten = torch.ops.aten
B, H, N, D = 2, 3, 10, 4
Q = (B, H, N, D)
Watch = Callable[[fx.GraphModule, list[Any]], None]


def traced(function: Callable[..., Any], shapes: list[tuple[int, ...]], watch: Watch) -> None:
    """Give the Dynamo graph of `function`, with what Dynamo recorded, to `watch`."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        watch(gm, inputs)
        return gm.forward

    tensors = [torch.randn(s) for s in shapes]
    torch.compile(function, backend=backend, dynamic=True, fullgraph=True)(*tensors)


def looked_at(gm: fx.GraphModule, inputs: list[Any]) -> Observation:
    return observe(gm, inputs, [False] * len(gm.graph.find_nodes(op="placeholder")))


def mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    return next(
        n.meta["example_value"].fake_mode
        for n in gm.graph.nodes
        if isinstance(n.meta.get("example_value"), Tensor)
    )


def company(value: Value) -> object:
    """A Value up to the names of its indices: who carries each index, its size, and how."""

    def carriers(index: Any) -> tuple[str, ...]:
        reads = [f for f in value.term.factors if index in f.indices()]
        return tuple(
            sorted(f"{f.leaf}{f.power}" if isinstance(f, Read) else f"{f}"[:5] for f in reads)
        )

    return (
        sorted((carriers(i), str(i.size)) for i in value.term.bound),
        [[(carriers(i), str(i.size)) for i in axis] for axis in value.axes],
        sorted(f"{f.leaf}{f.power}{f.dtype}" for f in value.term.factors if isinstance(f, Read)),
        len(value.term.factors),
        str(value.term.coef),
        value.term.precision,
        value.dtype,
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attention(q, k, v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(q, torch.bmm(k.transpose(1, 2), v)).unflatten(0, (B, H)).contiguous()


def written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.tanhshrink(q), F.normalize(k, dim=-1)
    scores = q @ k.mT
    q.mul_(2.0)
    k.add_(1.0)
    return scores @ v + q @ (k.mT @ v)


SPELLINGS = {
    "matmul": attention,
    "autocast": autocast,
    "merged": merged,
    "broadcast": lambda q, k, v: q @ (k[:, :1].mT @ v[:, :1]),
    "ranks": lambda q, k, v: q @ (k[0, 0].mT @ v[0, 0]),
    "einsum": lambda q, k, v: torch.einsum(
        "bhnd,bhde->bhne", q, torch.einsum("bhmd,bhme->bhde", k, v)
    ),
    "einsum, dots": lambda q, k, v: torch.einsum(
        "...nd,...de->...ne", q, torch.einsum("...md,...me->...de", k[0, 0], v[0])
    ),
    "one over": lambda q, k, v: (
        (q @ (k.mT @ v)) * (1.0 / (q * k.sum(-2, keepdim=True)).sum(-1, True))
    ),
    "written after": written_after,
    "einsum of three": lambda q, k, v: torch.einsum("bhnd,bhmd,bhme->bhne", q, k, v),
    "einsum, a trace": lambda q, k, v: torch.einsum("bhnd,bhnd->bh", q @ k.mT @ v, v),
    "linear": lambda q, k, v: torch.stack([F.linear(q[0, 0], v[0, 0].mT @ k[0, 0])]),
    "vector": lambda q, k, v: q @ k.sum((0, 1, 2)),
    "softmax": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "softmax, dtype": lambda q, k, v: q.softmax(-1, dtype=torch.float64) @ k.double().mT,
    "normalize": lambda q, k, v: F.normalize(q, dim=-1) @ (k.mT @ v),
    "pieces": lambda q, k, v: q @ (torch.cat(k.chunk(2, 1), 1).mT @ v.narrow(2, 0, v.shape[2])),
    "padded": lambda q, k, v: (q @ (k.mT @ F.pad(v, (0, 1), value=1.0)))[..., :-1],
    "moved": lambda q, k, v: (q.movedim(1, 2).movedim((1, 2), (2, 1)) @ k.swapaxes(-1, 2)) @ v,
    "repeated": lambda q, k, v: (
        q.repeat_interleave(2, 1) @ (k.repeat_interleave(2, 1).mT @ v.repeat_interleave(2, dim=1))
    ),
    "dropout": lambda q, k, v: F.dropout(q, 0.5, training=False) @ (k.to(q).mT @ v.type_as(q)),
    "dropout, training": lambda q, k, v: F.dropout(q, 0.5) @ (k.mT @ v),
    "in place": lambda q, k, v: (q @ k.mT).mul_(2.0) @ v,
    "rms": lambda q, k, v: F.rms_norm(q, (D,)) @ (k.mT @ F.layer_norm(v, (D,))),
    "reshaped in place": lambda q, k, v: (q * 2).squeeze_(0).unsqueeze_(0) @ (k.mT @ v),
    "a slice that the record already has": lambda q, k, v: q[:, :1] @ k[:, :1].mT @ v[:1, :1],
    "indexed": lambda q, k, v: torch.stack([q[:, 0], q[:, [1]][:, 0], q[None, :, 0][0], k[:, 0]])[
        1:
    ],
    "two operators": lambda q, k, v: (q @ k.mT)[:, 0, None, :, 1:],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_record_says_what_a_run_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[list[object]] = []

    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        for trusting in (True, False):
            if not trusting:
                monkeypatch.setattr(Observer, "from_record", _reshaped)
            seen = looked_at(gm, inputs)
            assert seen.errors == []
            results.append([(n.name, company(v)) for n, v in seen.values.items()])

    traced(SPELLINGS[name], [Q, Q, Q], watch)
    recorded, run = results
    assert recorded == run


def _reshaped(*_: Any) -> None:
    raise Reshaped


def test_nothing_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under symbolic sizes an operator on fake tensors costs milliseconds."""
    computed: list[str] = []
    dispatch = FakeTensorMode.dispatch

    def counted(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if any("Tensor" in str(r.type) for r in func._schema.returns):
            computed.append(str(func))
        return dispatch(self, func, *args, **kwargs)

    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
        seen = looked_at(gm, inputs)
        monkeypatch.undo()
        assert len(seen.values) > 10

    def block(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q, k = F.linear(q, w), F.layer_norm(F.gelu(k), (D,))
        return attention(q, k, v).transpose(1, 2).flatten(2).chunk(2, -1)[0].mul_(2.0)

    traced(block, [Q, Q, Q, (D, D)], watch)
    assert computed == []


def test_the_mode_and_the_guards_are_as_before() -> None:
    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        mode = mode_of(gm)
        env = mode.shape_env

        def state() -> object:
            return (
                mode.cache_enabled,
                len(env.guards),
                dict(env.replacements),
                {k: len(v) for k, v in env.deferred_runtime_asserts.items()},
                list(env.pending_fresh_unbacked_symbols),
                torch.is_autocast_enabled("cpu"),
            )

        before = state()
        for _ in range(2):
            looked_at(gm, inputs)
        assert state() == before

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = autocast(q, k, v).float() + F.normalize(q, dim=-1)[:, :, 1:].sum()
        torch._check(out.shape[0] > 0)
        return out.repeat_interleave(2, 1)

    traced(model, [Q, Q, Q], watch)


def test_unbacked_sizes_stay_unbacked() -> None:
    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        env = mode_of(gm).shape_env
        before = len(env.guards), dict(env.replacements), dict(env.var_to_range)
        seen = looked_at(gm, inputs)
        assert before == (len(env.guards), dict(env.replacements), dict(env.var_to_range))
        (value,) = [v for n, v in seen.values.items() if n.name == "matmul_1"]
        names = sorted(str(i.size) for i in value.term.bound)
        assert len(names) == 2
        assert any(name.startswith("u") for name in names)

    def model(q: Tensor, k: Tensor) -> Tensor:
        kept = k[k[:, 0] > 0]
        return torch.matmul(q, torch.matmul(kept.mT, kept))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced(model, [(N, D), (N, D)], watch)


def test_a_write_through_a_view_reaches_what_shares_its_memory() -> None:
    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        seen = looked_at(gm, inputs)
        relu = next(n for n in seen.values if n.target is F.relu)
        assert seen.written(relu, after=seen.position[relu])
        assert not seen.written(relu, after=seen.position[relu], before=seen.position[relu] + 1)

    def model(q: Tensor, k: Tensor) -> Tensor:
        q = F.relu(q)
        flat = q.view(-1)
        scores = q @ k.mT
        flat.zero_()
        return scores @ q

    traced(model, [Q, Q], watch)


def test_a_cast_of_autocast_is_not_shared_with_the_user() -> None:
    """y is written; z, a second cast of the same tensor, is not."""

    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        seen = looked_at(gm, inputs)
        casts = [n for n in seen.tensors if n.op == "call_method" and n.target == "bfloat16"]
        y, z = (seen.tensors[n] for n in casts)
        assert seen.storage_of(y) != seen.storage_of(z)

    def model(q: Tensor, k: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ k.mT
            y = q.bfloat16()
            y.add_(1)
            z = q.bfloat16()
            return scores + y @ k.mT + z @ k.mT

    traced(model, [Q, Q], watch)


def test_a_stand_in_is_like_the_result() -> None:
    def watch(gm: fx.GraphModule, inputs: list[Any]) -> None:
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        x, row = sorted((f for f in fakes if isinstance(f, Tensor)), key=Tensor.dim, reverse=True)
        plain: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (aten.linalg_vector_norm.default, (x, 2.0, [-1], True), {}),
            (aten.linalg_vector_norm.default, (x, 2.0, [1]), {}),
            (aten.sum.dim_IntList, (x, [1, -1]), {}),
            (aten.mean.dim, (x, [0], True), {}),
            (aten.mul.Tensor, (row, x), {}),
            (aten.add.Tensor, (x, row), {"alpha": 2}),
            (aten.clamp_min.default, (x, 1e-6), {}),
            (aten.div.Tensor, (x, x), {}),
        ]
        for func, args, kwargs in plain:
            with mode_of(gm):
                made, real = stand_in(func, args, kwargs), func(*args, **kwargs)
            assert made is not None
            assert (str(made.shape), made.dtype) == (str(real.shape), real.dtype)
        unclear: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (aten.sum.default, (x,), {}),
            (aten.sum.dim_IntList, (x, [1]), {"dtype": torch.float64}),
            (aten.mul.Tensor, (x, row.double()), {}),
            (aten.div.Tensor_mode, (x, x), {"rounding_mode": "floor"}),
            (aten.view.default, (x, list(x.shape)), {}),
            (aten.exp.default, (torch.empty(2, 3),), {}),
        ]
        assert [stand_in(*call) for call in unclear] == [None] * len(unclear)

    traced(lambda x, row: x + row, [Q, (D,)], watch)
