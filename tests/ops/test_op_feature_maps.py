# ruff: noqa: E501  (one error a line)
"""The operator with feature maps and key weights: values and every gradient against the formula
written out, derivatives, transforms, compilation, and the texts of errors.
"""

from __future__ import annotations

import pytest
import torch
from feature_map_table import PHI, POINTWISE
from linear_attention_formula import assert_within_budget, operator, plain, results
from torch._inductor.utils import run_fw_bw_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from bla_inductor.lowering import register
from bla_inductor.ops import dispatch
from bla_inductor.ops.schema import Inputs

f64 = torch.float64
ELU1, SOFTMAX, L2, EXP = (PHI[n][0] for n in ("elu + 1", "softmax", "l2 add", "exp"))
CASES = [("none", False), ("add", False), ("add", True), ("clamp", False), ("clamp", True)]
NUMBERS = {"scale": 0.7, "norm_scale": 0.3, "eps": 0.5}


def _agree(tensors, **arguments):
    out = plain(*tensors, **arguments)
    do = torch.randn_like(out)
    ours = results(operator, tensors, do, **arguments)
    exact = results(plain, tensors, do, **arguments)
    assert ours.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=lambda m, name=name: f"{name}: {m}")


def _inputs(*shapes, dtype=f64):
    """Positive, so that every function of the table is defined; no two entries the same."""
    return [torch.rand(s, dtype=dtype) + 0.2 for s in shapes]


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("normalizer", ["none", "add"])
def test_every_map(name, normalizer):
    text = PHI[name][0]
    tensors = _inputs((2, 3, 9, 4), (2, 1, 7, 4), (2, 3, 7, 5))
    if name not in ("sqrt", "rsqrt", "power 1.5", "power 0.3", "log", "log1p", "in two stages"):
        tensors[0] -= 0.8
        tensors[1] -= 0.8
    _agree(tensors, q_map=text, k_map=text, normalizer=normalizer, **NUMBERS)


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
@pytest.mark.parametrize("n", [3, 60])
def test_different_maps_on_every_tensor(normalizer, decoupled, n):
    """Both associations: with n = 3 the output's gradient-free path forms q kᵀ first."""
    tensors = _inputs((2, 3, n, 8), (2, 1, n + 2, 8), (2, 3, n + 2, 6))
    arguments = {"q_map": SOFTMAX, "k_map": ELU1, "normalizer": normalizer, **NUMBERS}
    if decoupled:
        tensors += _inputs((1, 3, n, 5), (2, 3, n + 2, 5))
        arguments |= {"q_norm_map": EXP, "k_norm_map": L2}
    _agree(tensors, **arguments)
    torch.testing.assert_close(operator(*tensors, **arguments), plain(*tensors, **arguments))


def test_the_same_tensor_with_another_map_in_the_normaliser():
    q, k, v = (t.requires_grad_() for t in _inputs((2, 9, 4), (2, 7, 4), (2, 7, 5)))
    arguments = {"q_map": ELU1, "k_map": SOFTMAX, "q_norm_map": EXP, "k_norm_map": L2}
    ours, exact = (
        torch.autograd.grad(
            f(q, k, v, q, k, normalizer="add", **arguments).square().sum(), (q, k, v)
        )
        for f in (operator, plain)
    )
    torch.testing.assert_close(ours, exact)


WEIGHTS = {
    "bool": lambda: torch.arange(7).expand(2, 1, 7) % 3 > 0,
    "float": lambda: torch.rand(2, 1, 7, dtype=f64),
    "negative": lambda: torch.randn(2, 3, 7, dtype=f64),
    "one for all": lambda: torch.rand(1, 1, 7, dtype=f64),
    "expanded": lambda: torch.rand(1, 1, 7, dtype=f64).expand(2, 3, 7),
    "transposed": lambda: torch.rand(2, 7, 3, dtype=f64).mT,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
@pytest.mark.parametrize("heads", [1, 3])
def test_key_weights(kind, normalizer, decoupled, heads):
    tensors = _inputs((2, 3, 9, 4), (2, heads, 7, 4), (2, 1, 7, 5))
    tensors += _inputs((2, 3, 9, 3), (1, heads, 7, 3)) if decoupled else [None, None]
    _agree([*tensors, WEIGHTS[kind]()], normalizer=normalizer, q_map=SOFTMAX, k_map=ELU1, **NUMBERS)


def test_a_weight_of_zero_is_a_key_that_is_not_there():
    q, k, v = _inputs((2, 9, 4), (2, 7, 4), (2, 7, 5))
    weight = torch.arange(7).expand(2, 7) < 5
    arguments = {"q_map": ELU1, "k_map": ELU1, "normalizer": "add"}
    torch.testing.assert_close(
        operator(q, k, v, None, None, weight, **arguments),
        operator(q, k[:, :5], v[:, :5], **arguments),
    )


@pytest.mark.parametrize("decoupled", [False, True])
def test_weights_where_no_state_is_formed(decoupled):
    """Without gradients a short sequence takes (q kᵀ) v."""
    tensors = _inputs((2, 3, 32), (2, 3, 32), (2, 3, 32), (2, 3, 4), (2, 3, 4), (2, 3))
    if not decoupled:
        tensors[3:5] = [None, None]
    arguments = {"normalizer": "add", "k_map": ELU1, **NUMBERS}
    torch.testing.assert_close(operator(*tensors, **arguments), plain(*tensors, **arguments))


def test_weights_broadcast_the_result():
    """A batch dim that the weights alone have."""
    tensors = [*_inputs((1, 9, 4), (1, 7, 4), (1, 7, 5)), None, None, *_inputs((3, 7))]
    assert operator(*tensors, normalizer="add").shape == (3, 9, 5)
    _agree(tensors, normalizer="add", **NUMBERS)


@pytest.mark.parametrize("needs", [(5,), (0, 5), (1, 5), (2,), (3, 5), (4,)])
def test_only_the_gradients_that_are_needed(needs):
    tensors = _inputs((2, 7, 4), (2, 5, 4), (2, 5, 6), (2, 7, 3), (1, 5, 3), (2, 5))
    arguments = {"normalizer": "add", "k_map": ELU1, "k_norm_map": EXP, "q_norm_map": ELU1}
    full = results(plain, tensors, torch.ones(2, 7, 6, dtype=f64), **arguments)
    leaves = [t.clone().requires_grad_(i in needs) for i, t in enumerate(tensors)]
    operator(*leaves, **arguments).sum().backward()
    for i, (leaf, exact) in enumerate(zip(leaves, list(full.values())[1:], strict=True)):
        assert (leaf.grad is not None) == (i in needs)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, exact)


@pytest.mark.parametrize("name", ["elu + 1", "relu", "silu", "gelu", "softmax", "relu, cube, l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_that_of_the_naive_graph(name, dtype):
    q, k = torch.randn(2, 3, 70, 24).to(dtype), torch.randn(2, 3, 50, 24).to(dtype)
    v, do = torch.randn(2, 3, 50, 40).to(dtype), torch.randn(2, 3, 70, 40).to(dtype)
    text, numbers = PHI[name][0], {"norm_scale": 1 / 32, "eps": 8.0}
    assert_within_budget(
        (q, k, v), do, normalizer="add", scale=1 / 32, q_map=text, k_map=text, **numbers
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, f64])
@pytest.mark.parametrize("differentiable", [False, True])
def test_the_gradient_of_the_weights_has_their_dtype(dtype, differentiable):
    q, k, v = _inputs((2, 9, 4), (2, 7, 4), (2, 7, 5), dtype=torch.bfloat16)
    weight = torch.rand(7, 2).to(dtype).T.requires_grad_(differentiable)
    out, state, key_sum = torch.ops.bla.linear_attention_forward(q, k, v, None, None, weight)
    tensors = (out, q, k, v, None, None, weight, state, key_sum)
    *_, dweight = torch.ops.bla.linear_attention_backward(*tensors, needs=[False] * 5 + [True])
    assert dweight.dtype == dtype
    assert dweight.shape == weight.shape


def _differentiable(decoupled):
    shapes = [(2, 2, 3, 2), (2, 1, 2, 2), (1, 1, 2, 2), (1, 2, 3, 2), (1, 2, 2, 2), (2, 1, 2)]
    tensors = [t.requires_grad_() for t in _inputs(*shapes)]
    return tensors if decoupled else [*tensors[:3], None, None, tensors[5]]


MAPS = [(ELU1, ELU1), (SOFTMAX, EXP), (L2, PHI["gelu"][0])]


@pytest.mark.parametrize(("normalizer", "decoupled"), [("none", False), ("add", True)])
@pytest.mark.parametrize(("q_map", "k_map"), MAPS)
def test_first_and_second_derivatives(q_map, k_map, normalizer, decoupled):
    tensors = _differentiable(decoupled)
    given = [t for t in tensors if t is not None]
    maps = {"q_map": q_map, "k_map": k_map}
    if decoupled:
        maps |= {"q_norm_map": k_map, "k_norm_map": q_map}

    def f(*leaves):
        rest = iter(leaves)
        full = [None if t is None else next(rest) for t in tensors]
        return operator(*full, normalizer=normalizer, **NUMBERS, **maps)

    assert torch.autograd.gradcheck(f, given)
    assert torch.autograd.gradgradcheck(f, given)


def test_second_derivative_where_an_unused_piece_overflows():
    x = torch.tensor([[800.0, -0.5], [0.5, 800.0]], dtype=f64, requires_grad=True)

    def second(f):
        out = f(x, x, x, q_map=ELU1, k_map=ELU1, normalizer="add")
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    assert second(operator).isfinite().all()
    torch.testing.assert_close(second(operator), second(plain))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
def test_opcheck(decoupled, boolean):
    tensors = _differentiable(decoupled)
    if boolean:
        tensors[5] = tensors[5].detach() > 0.5
    arguments = {"normalizer": "add", "q_map": SOFTMAX, "k_map": ELU1, **NUMBERS}
    if decoupled:
        arguments |= {"q_norm_map": EXP, "k_norm_map": L2}
    opcheck(torch.ops.bla.linear_attention.default, tensors, arguments)
    opcheck(torch.ops.bla.linear_attention_forward.default, tensors, arguments)
    with torch.no_grad():
        out, state, key_sum = torch.ops.bla.linear_attention_forward(*tensors, **arguments)
    detached = [None if t is None else t.detach() for t in tensors]
    needs = [t is not None and t.is_floating_point() for t in tensors]
    opcheck(
        torch.ops.bla.linear_attention_backward.default,
        (torch.ones_like(out), *detached, state, key_sum),
        {**arguments, "needs": needs, "orders": [0, 2, 1, 3] * 5},
    )


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, 1), (None, 1, 2, None)])
def test_vmap_of_value_and_gradient(in_dims):
    base = _inputs((3, 5, 4), (3, 6, 4), (3, 6, 2), (3, 6))
    tensors = [t[0] if d is None else t.movedim(0, d) for t, d in zip(base, in_dims, strict=True)]

    def loss(f):
        arguments = {"q_map": SOFTMAX, "k_map": ELU1, "normalizer": "add", "eps": 0.5}
        return lambda q, k, v, w: f(q, k, v, None, None, w, **arguments).square().sum()

    for transform in (lambda f: f, lambda f: grad(f, argnums=(0, 1, 2, 3))):
        ours = vmap(transform(loss(operator)), in_dims)(*tensors)
        exact = vmap(transform(loss(plain)), in_dims)(*tensors)
        torch.testing.assert_close(ours, exact)


def test_weights_alone_are_mapped():
    q, k, v, weights = _inputs((5, 4), (6, 4), (6, 2), (3, 6))

    def forward(w):
        return torch.ops.bla.linear_attention_forward(q, k, v, None, None, w, normalizer="add")

    looped = tuple(torch.stack(t) for t in zip(*map(forward, weights), strict=True))
    torch.testing.assert_close(vmap(forward)(weights), looped)


def test_vmap_of_the_backward_with_a_mapped_state():
    q, k, v, weight, do = _inputs((3, 5, 4), (3, 6, 4), (3, 6, 2), (3, 6), (3, 5, 2))
    _, state, key_sum = torch.ops.bla.linear_attention_forward(q, k, v, None, None, weight)
    needs = [True, True, True, False, False, True]

    def backward(do, q, k, v, weight, state):
        tensors = (do, q, k, v, None, None, weight, state, key_sum)
        grads = torch.ops.bla.linear_attention_backward(*tensors, needs=needs)
        return [g for g, need in zip(grads, needs, strict=True) if need]

    tensors = (do, q, k, v, weight, state)
    mapped = vmap(backward, in_dims=(0, 0, 0, 0, 0, 1))(*tensors[:5], state.movedim(0, 1))
    looped = [torch.stack(g) for g in zip(*map(backward, *tensors), strict=True)]
    torch.testing.assert_close(mapped, looped)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_aot_autograd(dynamic):
    def f(q, k, v, weight):
        arguments = {"q_map": SOFTMAX, "k_map": ELU1, "normalizer": "add", "eps": 0.5}
        return operator(q, k, v, None, None, weight, **arguments)

    run = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (5, 9):
        tensors = _inputs((2, n, 4), (2, n + 1, 4), (2, n + 1, 3), (2, n + 1))
        do = torch.randn(2, n, 3, dtype=f64)
        ours, exact = results(run, tensors, do), results(f, tensors, do)
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name], msg=name)


@pytest.mark.slow
def test_inductor_takes_maps_and_weights_apart():
    """On a CPU nothing is left of the operator: φ and the weights are in Inductor's own loops."""
    register()

    def f(q, k, v, weight):
        arguments = {"q_map": SOFTMAX, "k_map": ELU1, "normalizer": "add", "eps": 0.5}
        return operator(q, k, v, None, None, weight, **arguments)

    tensors = [t.float() for t in _inputs((2, 8, 4), (2, 9, 4), (2, 9, 3), (2, 9))]
    leaves = [t.requires_grad_() for t in tensors]
    run = torch.compile(f, backend="inductor", fullgraph=True)
    _, codes = run_fw_bw_and_get_code(lambda: run(*leaves))
    assert len(codes) == 2
    for code in codes:
        assert "torch.ops.bla" not in code
        assert "exp" in code
    do = torch.randn(2, 8, 3)
    ours, exact = results(run, tensors, do), results(f, tensors, do)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=name)


def test_saved_for_backward_is_raw():
    """q, k, v, the weights and the state: nothing that φ made."""
    tensors = [*_inputs((2, 9, 4), (2, 7, 4), (2, 7, 5)), None, None, *_inputs((2, 7))]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(*leaves, q_map=ELU1, k_map=ELU1)
    pointers = {t.data_ptr() for t in leaves if t is not None}
    others = [t.shape for t in saved if t.data_ptr() not in pointers]
    assert others == [(2, 4, 5), (0,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, f64])
def test_fakes_agree(dtype):
    q, k, v = _inputs((2, 3, 9, 4), (2, 1, 7, 4), (1, 1, 7, 5), dtype=torch.bfloat16)
    weight = torch.rand(2, 3, 7).to(dtype)
    tensors = [q, k, v, q[..., :2], k[..., :2], weight]
    arguments = {"normalizer": "add", "q_map": ELU1, "out_dtype": torch.float32}
    mode = FakeTensorMode()
    real = torch.ops.bla.linear_attention_forward(*tensors, **arguments)
    fakes = [mode.from_tensor(t) for t in tensors]
    fake = torch.ops.bla.linear_attention_forward(*fakes, **arguments)
    del arguments["out_dtype"]
    real_grads, fake_grads = (
        torch.ops.bla.linear_attention_backward(out, *t, *rest, **arguments, needs=[True] * 6)
        for (out, *rest), t in ((real, tensors), (fake, fakes))
    )
    for a, b in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_flops_count_the_weights_batch():
    q, k, v, weight = _inputs((1, 10, 4), (1, 20, 4), (1, 20, 6), (3, 20))
    with FlopCounterMode(display=False) as counter:
        operator(q, k, v, None, None, weight)
    assert counter.get_total_flops() == 2 * 4 * 6 * 3 * (10 + 20)
    weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        operator(q, k, v, None, None, weight).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 6 * 3 * (2 * 10 + 2 * 20)


X = torch.rand(2, 3, 7, 4)
W = torch.rand(2, 3, 7)
ERRORS = [
    ({"key_weight": W.int()}, TypeError, r"'key_weight' has dtype torch.int32, expected torch.bool or one of .*Cast it"),
    ({"key_weight": W.to("meta")}, ValueError, r"'key_weight' is on meta, expected cpu, the device of 'q'"),
    ({"key_weight": W[0]}, ValueError, r"'key_weight' has shape \(3, 7\), expected 3 dims \(\*batch, M\), one less than 'k'"),
    ({"key_weight": W[..., :5]}, ValueError, r"'key_weight' has shape \(2, 3, 5\), expected size 7 in its last dim, one weight"),
    ({"key_weight": W[:, :2]}, ValueError, r"'key_weight' has shape \(2, 2, 7\), expected size 3 or 1 in batch dim 1, as 'q'"),
    ({"q_map": "relu(x)"}, ValueError, r"'q_map' is 'relu\(x\)': .*relu is not in the language.* A stage is"),
    ({"q_norm_map": "exp(x)", "normalizer": "add"}, ValueError, r"'q_norm_map' is 'exp\(x\)', but there is no 'q_norm' to map\. Give q_norm=q,"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[e[2][:24] for e in ERRORS])
def test_errors_name_argument_found_expected_and_remedy(arguments, error, text):
    with pytest.raises(error, match="bla::linear_attention: argument " + text):
        operator(X, X, X, **arguments)


def test_pointwise_maps_of_the_table_are_reached():
    """The table holds each spelling once: a text names one function."""
    assert len({text for text, _ in PHI.values()}) == len(PHI)
    assert len(POINTWISE) > 30


@pytest.mark.parametrize(
    ("text", "covered"), [("relu", True), ("", True), ("1/x", False), ("l2", False)]
)
def test_a_map_without_a_value_at_zero_runs_in_aten(text, covered):
    """The kernels fill their tiles up with zeros; ATen has no tiles."""
    pytest.importorskip("triton")
    text = "Piecewise((0, x <= 0), (x, True))" if text == "relu" else text
    q, k, v = torch.rand(3, 2, 10, 16)
    made = dispatch._kernels(Inputs(q, k, v, q_map=text), torch.float32)
    assert (made is not None) == covered
