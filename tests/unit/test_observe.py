"""What the observing interpreter says a tensor is. No compilation: graphs come from
fx.symbolic_trace.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from bla_inductor.algebra import Delta, Guard, Mask, Observation, Opaque, Read, Value, observe

B, H, N, D = 2, 3, 10, 4
Q = (B, H, N, D)


def seen(function, *shapes, fixed=None, dtype=torch.float32) -> tuple[Observation, Value]:
    """The observation of `function` and the Value of what it returns."""
    gm = fx.symbolic_trace(function)
    inputs = [torch.empty(s, dtype=dtype) for s in shapes]
    result = observe(gm, inputs, fixed or [False] * len(inputs))
    assert result.errors == []
    (out,) = gm.graph.find_nodes(op="output")
    return result, result.values[out.args[0]]


def told(value: Value) -> str:
    """A Value as text with canonical letters, to compare two spellings by."""
    names: dict[object, str] = {}

    def name(index) -> str:
        return names.setdefault(index, f"{'abcdefghijklmnop'[len(names)]}{index.size}")

    def factor(f) -> str:
        if isinstance(f, Read):
            axes = ",".join(".".join(map(name, a)) or "1" for a in f.axes)
            return f"{f.leaf}[{axes}]^{f.power}"
        return f"{f.kind}({term(f.term)},{f.eps})^{f.power}"

    def term(t) -> str:
        text = " ".join(sorted(factor(f) for f in t.factors))
        return f"{t.coef:g} sum({sorted(map(name, t.bound))}) {text}"

    axes = [[name(i) for i in a] for a in value.axes]
    return f"{axes} = {term(value.term)}"


def swapped(q, k, v):
    return q @ (k.transpose(-1, -2) @ v)


SAME = {
    "quadratic": lambda q, k, v: (q @ k.mT) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhnd,bhmd,bhme->bhne", q, k, v),
    "permute": lambda q, k, v: torch.matmul(q, torch.matmul(k.permute(0, 1, 3, 2), v)),
    "outer": lambda q, k, v: (
        q.unsqueeze(-1) * (k.unsqueeze(-1) * v.unsqueeze(-2)).sum(2, keepdim=True)
    ).sum(-2),
    "bmm": lambda q, k, v: torch.bmm(
        q.flatten(0, 1), torch.bmm(k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1))
    ).unflatten(0, (B, H)),
    "heads_merged": lambda q, k, v: torch.einsum(
        "znd,zde->zne",
        q.reshape(-1, N, D),
        torch.einsum("znd,zne->zde", k.reshape(-1, N, D), v.reshape(-1, N, D)),
    ).view(B, H, N, D),
    "scaled_there_and_back": lambda q, k, v: q @ ((k * 4).mT @ (v / 4)),
    "cloned": lambda q, k, v: q.contiguous() @ (k.mT.clone() @ v.float()),
}


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_is_the_same_term(name) -> None:
    _, want = seen(swapped, Q, Q, Q)
    _, got = seen(SAME[name], Q, Q, Q)
    shape = lambda v: (  # noqa: E731
        sorted(str(f.leaf) for f in v.term.factors),
        sorted(i.size for i in v.term.bound),
        [tuple(i.size for i in a) for a in v.axes],
        v.term.coef,
    )
    assert shape(got) == shape(want)
    company = lambda v: sorted(  # noqa: E731
        tuple(sorted(str(f.leaf) for f in v.term.factors if i in f.indices())) for i in v.term.bound
    )
    assert company(got) == company(want) == [("k", "q"), ("k", "v")]


def test_mean_divides_by_the_size() -> None:
    _, value = seen(lambda q, k: (q @ k.mean(-2, keepdim=True).mT) * N**0.5, Q, Q)
    assert value.term.coef == pytest.approx(N**-0.5)


def test_ones_on_the_values_give_numerator_and_normaliser_back() -> None:
    def padded(q, k, v):
        out = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
        return out[..., :-1] / out[..., -1:]

    _, value = seen(padded, Q, Q, Q)
    (guard,) = [f for f in value.term.factors if isinstance(f, Guard)]
    assert guard.power == -1
    assert sorted(str(leaf) for leaf in guard.term.leaves()) == ["k", "q"]
    assert sorted(str(f.leaf) for f in value.term.factors if isinstance(f, Read)) == ["k", "q", "v"]


def test_another_fill_is_a_coefficient() -> None:
    def padded(q, k, v):
        return (q @ (k.mT @ F.pad(v, (0, 1), value=3.0)))[..., -1]

    _, value = seen(padded, Q, Q, Q)
    assert value.term.coef == 3.0


@pytest.mark.parametrize(
    ("divide", "kind", "eps"),
    [
        (lambda a, z: a / (z + 1e-6), "add", 1e-6),
        (lambda a, z: a * (1 / (z + 1e-6)), "add", 1e-6),
        (lambda a, z: a / torch.add(1e-6, z), "add", 1e-6),
        (lambda a, z: a / z, "add", 0.0),
        (lambda a, z: a / z.clamp(min=0.1), "clamp", 0.1),
        (lambda a, z: a / torch.clamp_min(z, 0.1), "clamp", 0.1),
        (lambda a, z: a / torch.maximum(z, torch.full_like(z, 0.01)), "clamp", pytest.approx(0.01)),
    ],
)
def test_guards(divide, kind, eps) -> None:
    _, value = seen(lambda q, k: divide(q, (q * k.sum(-2, keepdim=True)).sum(-1, True)), Q, Q)
    (guard,) = [f for f in value.term.factors if isinstance(f, Guard)]
    assert (guard.kind, guard.eps, guard.power) == (kind, eps, -1)


def test_a_guard_keeps_its_summed_indices_to_itself() -> None:
    """A / A.sum(): the row sum is over indices of its own, which no substitution can capture."""

    def rows(q, k):
        scores = q @ k.mT
        return scores / scores.sum(-1, keepdim=True)

    _, value = seen(rows, Q, Q)
    (guard,) = [f for f in value.term.factors if isinstance(f, Guard)]
    assert not set(guard.term.bound) & {*value.term.bound, *(i for a in value.axes for i in a)}


@pytest.mark.parametrize(
    ("phi", "is_sum"),
    [
        (F.relu, True),
        (lambda x: F.elu(x) + 1, True),
        (lambda x: F.elu(x) + 0.5, False),
        (lambda x: x.exp() * 2, True),
        (lambda x: -x.exp(), False),
        (lambda x: x**2, True),
        (lambda x: x**3, False),
        (torch.tanh, False),
        (lambda x: x.softmax(-1), True),
        (lambda x: x.clamp(min=0.1), True),
        (lambda x: x.clamp(max=0.1), False),
    ],
)
def test_the_l1_norm_of_what_is_not_negative_is_a_sum(phi, is_sum) -> None:
    _, value = seen(lambda q, k: F.normalize(phi(q) @ k.exp().mT, p=1, dim=-1), Q, Q)
    guards = [f for f in value.term.factors if isinstance(f, Guard)]
    assert len(guards) == is_sum


def test_the_last_entry_of_a_running_sum_is_the_sum() -> None:
    _, value = seen(lambda k: k.cumsum(-2)[:, :, -1], Q)
    assert [i.size for i in value.term.bound] == [N]
    _, value = seen(lambda k: k.cumsum(-2)[:, :, -2], Q)
    assert not value.term.bound


def test_projection_is_a_leaf() -> None:
    """x @ A @ B with parameters is a (low-rank) projection, whatever the order."""
    for function in (lambda x, a, b: x @ a @ b, lambda x, a, b: x @ (a @ b)):
        _, value = seen(function, (N, D), (D, 2), (2, D), fixed=[False, True, True])
        assert len(value.term.factors) == 1
        assert not value.term.bound


def test_only_graph_results_are_leaves() -> None:
    """The norm inside F.normalize lives in one node: the node's result is the leaf."""
    _, value = seen(lambda q, k: F.normalize(q, dim=-1) @ k.mT, Q, Q)
    assert sorted(str(f.leaf) for f in value.term.factors) == ["k", "normalize"]


def test_detach_is_a_leaf() -> None:
    """Looking through it would give gradients to what the user cut off."""
    _, value = seen(lambda q, k: q.detach() @ k.mT, Q, Q)
    assert sorted(str(f.leaf) for f in value.term.factors) == ["detach", "k"]


def test_narrowing_is_remembered() -> None:
    _, value = seen(lambda q, k: q.bfloat16().float() @ k.float().mT, Q, Q)
    assert {str(f.leaf): f.dtype for f in value.term.factors} == {
        "q": torch.bfloat16,
        "k": torch.float32,
    }
    assert value.dtype == torch.float32


def test_precision_is_that_of_the_sums() -> None:
    _, value = seen(
        lambda q, k, v: q.float() @ (k.float().mT @ v.float()), Q, Q, Q, dtype=torch.half
    )
    assert value.term.precision == torch.float32
    _, value = seen(lambda q, k, v: (q @ (k.mT @ v)).float(), Q, Q, Q, dtype=torch.half)
    assert value.term.precision == torch.half


def test_in_place_operator_on_a_product() -> None:
    def scaled(q, k):
        return (q @ k.mT).mul_(2.0)

    _, value = seen(scaled, Q, Q)
    assert value.term.coef == 2.0


def test_what_was_overwritten_is_a_new_leaf() -> None:
    def overwritten(q, k):
        scores = q @ k.mT
        q.add_(1.0)
        return scores @ q

    result, _ = seen(overwritten, Q, Q)
    written = next(n for n in result.values if n.name == "q")
    assert result.written(written, after=result.position[written])


def test_write_through_a_view_reaches_the_base() -> None:
    def through_view(q, k):
        base = q * 2
        base.view(-1)[0:4].zero_()
        return base @ k.mT

    _, value = seen(through_view, Q, Q)
    assert sorted(str(f.leaf) for f in value.term.factors) == ["k", "mul"]
    assert value.term.coef == 1.0


def kinds(value: Value) -> list[str]:
    return sorted(type(f).__name__ for f in value.term.factors)


@pytest.mark.parametrize(
    ("fill", "keep"),
    [
        (lambda s, m: s.masked_fill(m > 0, 0.0), False),
        (lambda s, m: torch.where(m > 0, s, 0.0), True),
        (lambda s, m: torch.where(m > 0, torch.zeros_like(s), s), False),
        (lambda s, m: s.masked_fill_(m > 0, 0), False),
    ],
)
def test_a_masked_product_is_a_product(fill, keep) -> None:
    _, value = seen(lambda q, k, m: fill(q @ k.mT, m), Q, Q, (B, 1, 1, N))
    (mask,) = [f for f in value.term.factors if isinstance(f, Mask)]
    assert (str(mask.leaf), mask.keep) == ("gt", keep)
    assert [tuple(i.size for i in a) for a in mask.axes] == [(B,), (), (), (N,)]


@pytest.mark.parametrize(
    "fill",
    [
        lambda q, k, m: (q @ k.mT).masked_fill(m > 0, 1.0),
        lambda q, k, m: torch.where(m > 0, q @ k.mT, m),
        lambda q, k, m: q.masked_fill(m.mT > 0, 0.0),
        lambda q, k, m: torch.where(m > 0, q @ k.mT, torch.zeros(2, B, H, N, N)),
    ],
)
def test_other_fills_and_masked_inputs_are_leaves(fill) -> None:
    _, value = seen(fill, Q, Q, (B, 1, 1, N))
    assert kinds(value) == ["Read"]
    assert not value.term.bound


# fx.symbolic_trace computes what depends on no input; `computed` is a node, run with the rest.
PATTERNS = {
    "identity": lambda: torch.eye(N),
    "ones on it": lambda: torch.eye(N).bool().float().sum(0),
    "division": lambda: (torch.arange(H * D) // D)[:, None] == torch.arange(H * D) // D,
    "remainder": lambda: (torch.arange(H * D) % D)[:, None] == torch.arange(H * D) % D,
    "unequal": lambda: ~((torch.arange(H * D) // D)[:, None] != torch.arange(H * D) // D),
    "ranges": lambda: torch.arange(0, H)[:, None] == torch.arange(0, H, 1),
    "kronecker": lambda: torch.kron(torch.eye(H), torch.ones(D, D)),
    "block_diag": lambda: torch.block_diag(*[torch.ones(D, D)] * H),
    "not zero": lambda: torch.eye(H).repeat_interleave(D, 0) != 0,
    "uneven": lambda: torch.arange(H * D)[:, None] // 5 == torch.arange(H * D) // 5,
    "shifted": lambda: torch.arange(1, H + 1)[:, None] == torch.arange(H),
    "strided": lambda: torch.arange(0, 2 * H, 2)[:, None] == torch.arange(0, 2 * H, 2),
    "oblong": lambda: torch.eye(H, H + 1),
    "unlike blocks": lambda: torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)),
    "other numbers": lambda: torch.block_diag(torch.ones(2, 2), torch.zeros(2, 2)),
    "zeros": lambda: torch.zeros(N, N),
    "tenths": lambda: torch.full((1, 1, 1), 0.1),
    "below": lambda: torch.arange(H)[:, None] <= torch.arange(H),
}
BLOCKS = ["division", "unequal", "ranges", "kronecker", "block_diag", "not zero", "remainder"]
NO_BLOCKS = ["uneven", "shifted", "strided", "oblong", "unlike blocks", "other numbers", "below"]


@fx.wrap
def computed(name, _):
    return PATTERNS[name]()


def test_a_sum_over_a_delta_renames() -> None:
    _, want = seen(lambda k, v: k.mT @ v, (N, D), (N, D))
    _, got = seen(lambda k, v: k.mT @ (computed("identity", k) @ v), (N, D), (N, D))
    assert told(got) == told(want)


@pytest.mark.parametrize("name", ["identity", "ones on it"])
def test_a_delta_counts_where_nothing_is_left_to_rename(name) -> None:
    _, value = seen(lambda k: computed(name, k).sum(), (N, D))
    assert value.term.coef == N
    assert not value.term.factors


@pytest.mark.parametrize("name", BLOCKS)
def test_block_masks_are_deltas(name) -> None:
    _, value = seen(lambda x: computed(name, x), Q)
    (delta,) = value.term.factors
    assert isinstance(delta, Delta)
    assert delta.keep
    assert value.term.coef == 1
    sizes = [[i.size for i in axis] for axis in (delta.a, delta.b)]
    assert sizes == ([[D], [D]] if name == "remainder" else [[H], [H]])


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_other_patterns_are_not(name) -> None:
    _, value = seen(lambda x: computed(name, x), Q)
    assert kinds(value) == ["Read"]


def test_the_diagonal_of_a_product() -> None:
    _, want = seen(lambda k, v: torch.einsum("bhnc,bhnd->bhcd", k, v), Q, Q)
    _, got = seen(
        lambda k, v: torch.einsum("bhnc,bgnd->bhgcd", k, v).diagonal(0, 1, 2).movedim(-1, 1), Q, Q
    )
    assert told(got) == told(want)
    _, value = seen(lambda k, v: (k.mT @ v).diagonal(1, -2, -1), Q, Q)
    assert kinds(value) == ["Read"]


@pytest.mark.parametrize(
    ("cast", "looked_through"),
    [
        (lambda x: x.long().float(), False),
        (lambda x: x.bool() * 1.0, False),
        (lambda x: x.to(torch.complex64).real, False),
        (lambda x: x.double().float(), True),
        (lambda x: (x > 0).long().float(), None),
    ],
)
def test_casts_that_lose_more_than_precision_are_leaves(cast, looked_through) -> None:
    _, value = seen(lambda q, k: cast(q) @ k.mT, Q, Q)
    leaves = sorted(str(f.leaf) for f in value.term.factors)
    expected = {True: "q", False: None, None: "gt"}[looked_through]
    assert (expected in leaves) if expected else ("q" not in leaves)


def test_what_one_operator_adds_is_remembered() -> None:
    _, value = seen(
        lambda x, q, k: torch.baddbmm(x, q, k.mT, beta=0.5, alpha=2.0), (B, N, N), *[(B, N, D)] * 2
    )
    (read,) = value.term.factors
    product, added = read.leaf.origin.args
    assert product.term.coef == 2.0
    assert sorted(str(f.leaf) for f in product.term.factors) == ["k", "q"]
    assert [str(f.leaf) for f in added.term.factors] == ["x"]
    assert dict(read.leaf.origin.kwargs) == {"alpha": 0.5}


def test_a_quotient_that_one_operator_adds_is_remembered() -> None:
    _, value = seen(
        lambda x, q, k: torch.addcdiv(x, q @ k.mT, (q @ k.mT).sum(-1, keepdim=True), value=2.0),
        (B, N, N),
        *[(B, N, D)] * 2,
    )
    (read,) = value.term.factors
    quotient, _ = read.leaf.origin.args
    assert kinds(quotient) == ["Guard", "Read", "Read"]
    assert quotient.term.coef == 2.0


@pytest.mark.parametrize(
    ("sum_", "kind"),
    [
        (lambda q, k: torch.baddbmm(computed("zeros", q), q, k.mT), ["Read", "Read"]),
        (lambda q, k: torch.baddbmm(torch.empty(N, N), q, k.mT, beta=0), ["Read", "Read"]),
        (lambda q, k: torch.baddbmm(computed("tenths", q), q, k.mT), ["Guard"]),
        (lambda q, k: torch.addbmm(computed("zeros", q), q, k.mT), ["Read", "Read"]),
        (lambda q, k: torch.addcmul(torch.zeros(B, B, N), q.sum(-1), k.sum(-1)), ["Read"]),
    ],
)
def test_adding_a_constant_in_the_same_operator(sum_, kind) -> None:
    _, value = seen(sum_, (B, N, D), (B, N, D))
    assert kinds(value) == kind


def test_a_sum_of_a_product_is_as_deep_as_the_product() -> None:
    _, value = seen(lambda q, k, v: q @ (k.mT @ v).sum(1, keepdim=True), Q, Q, Q)
    assert sorted(str(f.leaf) for f in value.term.factors) == ["k", "q", "v"]


def test_subclasses_are_not_looked_into() -> None:
    class Wrapped(torch.Tensor):
        pass

    gm = fx.symbolic_trace(lambda q: q * 2)
    with pytest.raises(Opaque, match="Wrapped"):
        observe(gm, [torch.ones(3).as_subclass(Wrapped)], [False])


def test_nothing_global_is_changed() -> None:
    gm = fx.symbolic_trace(lambda q: torch.nn.functional.dropout(q, 0.5) @ q.mT)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        observe(gm, [torch.ones(Q)], [False])
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_an_operator_with_results_that_are_no_tensors() -> None:
    """scaled_dot_product_attention returns integers beside tensors on a GPU."""
    with torch.library._scoped_library("bla_test", "DEF") as lib:
        lib.define("mixed(Tensor x) -> (Tensor, int, Tensor)")
        lib.impl("mixed", lambda x: (x * 2, 3, x + 1), "CompositeExplicitAutograd")
        torch.library.register_fake("bla_test::mixed", lambda x: (x * 2, 3, x + 1), lib=lib)
        _, value = seen(lambda q, k: torch.ops.bla_test.mixed(q)[2] @ k.mT, Q, Q)
    assert sorted(str(f.leaf) for f in value.term.factors) == ["getitem", "k"]
