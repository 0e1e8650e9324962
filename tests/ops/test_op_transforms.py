"""opcheck, first and second derivatives, forward mode, vmap, autocast, compilation, FLOP counting,
and a cold import.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad
from linear_attention_formula import operator, plain, results
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

f64 = torch.float64


def _tensors(decoupled, dtype=f64):
    shapes = [(2, 3, 5, 4), (2, 1, 6, 4), (2, 1, 6, 3)] + [(1, 3, 5, 2), (2, 3, 6, 2)] * decoupled
    return tuple(torch.rand(s, dtype=dtype).add(0.1).requires_grad_() for s in shapes)


CASES = [("none", False), ("add", False), ("add", True), ("clamp", False), ("clamp", True)]


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
def test_opcheck(normalizer, decoupled):
    arguments = {"normalizer": normalizer, "scale": 0.7, "norm_scale": 0.3, "eps": 0.5}
    tensors = _tensors(decoupled)
    opcheck(operator_packet(), tensors, {**arguments, "out_order": [0, 2, 1, 3]})
    opcheck(torch.ops.bla.linear_attention_forward.default, tensors, arguments)
    with torch.no_grad():
        out, state, key_sum = torch.ops.bla.linear_attention_forward(*tensors, **arguments)
    q, k, v, q_norm, k_norm = (t.detach() for t in (*tensors, *tensors[:2])[:5])
    norms = (q_norm, k_norm) if decoupled else (None, None)
    opcheck(
        torch.ops.bla.linear_attention_backward.default,
        (torch.ones_like(out), q, k, v, *norms, None, state, key_sum),
        {**arguments, "needs": [True] * 6, "orders": [0, 2, 1, 3] * 5},
    )


def operator_packet():
    return torch.ops.bla.linear_attention.default


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
def test_first_and_second_derivatives(normalizer, decoupled):
    def f(*tensors):
        return operator(*tensors, normalizer=normalizer, scale=0.7, norm_scale=0.3, eps=0.5)

    assert torch.autograd.gradcheck(f, _tensors(decoupled))
    assert torch.autograd.gradgradcheck(f, _tensors(decoupled))


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
def test_forward_mode_and_forward_over_reverse(normalizer, decoupled):
    def f(*tensors):
        return operator(*tensors, normalizer=normalizer, scale=0.7, norm_scale=0.3, eps=0.5)

    tensors = _tensors(decoupled)
    checks = {"check_forward_ad": True, "check_backward_ad": False}
    assert torch.autograd.gradcheck(f, tensors, **checks, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dual_number(requires_grad):
    """Also where an input requires a gradient; the result is laid out and cast as ever."""
    q, k, v, t = (torch.rand(2, 5, 4) for _ in range(4))
    q.requires_grad_(requires_grad)
    arguments = {"normalizer": "add", "eps": 0.5, "q_map": "exp(x)"}
    form = {"out_order": [1, 0, 2], "out_dtype": torch.float64}
    with fwad.dual_level():
        out = operator(fwad.make_dual(q, t), k, v, **arguments, **form)
        expected = plain(fwad.make_dual(q.exp(), t * q.exp()), k, v, normalizer="add", eps=0.5)
        ours, exact = fwad.unpack_dual(out), fwad.unpack_dual(expected)
        torch.testing.assert_close(ours.primal, exact.primal.double())
        torch.testing.assert_close(ours.tangent, exact.tangent.double())
    assert out.stride() == operator(q, k, v, **arguments, **form).stride()


def test_a_jvp_of_one_operand_or_under_no_forward_mode():
    q, k, v = (torch.rand(2, 5, 4, dtype=f64) for _ in range(3))
    for with_one in (
        lambda f: lambda x: f(x, k, v),
        lambda f: lambda x: f(q, x, v),
        lambda f: lambda x: f(q, k, x),
    ):
        ours, exact = (jvp(with_one(f), (q,), (k,)) for f in (operator, plain))
        torch.testing.assert_close(ours, exact)
    with fwad.dual_level(), fwad._set_fwd_grad_enabled(False):
        out = operator(fwad.make_dual(q, k), k, v)
    assert torch.equal(out, operator(q, k, v))


SECOND = {"forward over reverse": hessian, "reverse over forward": lambda f: jacrev(jacfwd(f))}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_second_derivatives_with_forward_mode(second, place):
    tensors = [torch.rand(1, 5, 4, dtype=f64) for _ in range(3)]

    def of(function):
        return lambda x: _loss(function)(*(x if i == place else t for i, t in enumerate(tensors)))

    ours, exact = (second(of(f))(tensors[place]) for f in (operator, plain))
    torch.testing.assert_close(ours, exact)


def test_hessian_in_a_graph_of_dynamos():
    """Where nothing but the tensors knows of forward mode. Our Function turned it off for the
    transforms outside.
    """
    q, k, v = (torch.rand(1, 5, 4, dtype=f64) for _ in range(3))

    def of(function):
        return hessian(lambda x: _loss(function)(x, k, v))

    run = torch.compile(of(operator), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(q), of(plain)(q))


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["linear_attention", "piecewise_sparse_attention"])
def test_dynamo_leaves_the_implementations_alone(name, grad_mode):
    """After a graph break in a loop torch calls them with Dynamo watching."""
    arguments = {
        "linear_attention": {"normalizer": "add", "eps": 0.5, "q_map": "exp(x)"},
        "piecewise_sparse_attention": {
            "density": 0.5,
            "block_size": 16,
            "approximate_training": True,
        },
    }[name]
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm.code)
        return gm

    def f(*tensors):
        for _ in range(2):
            torch._dynamo.graph_break()
            out = getattr(torch.ops.bla, name)(*tensors, **arguments)
            if out.requires_grad:
                torch.autograd.grad(out, tensors, torch.ones_like(out))
        return out

    with grad_mode():
        tensors = [torch.rand(1, 32, 4) for _ in range(3)]
        if torch.is_grad_enabled():
            tensors = [t.requires_grad_() for t in tensors]
        torch.testing.assert_close(torch.compile(f, backend=backend)(*tensors), f(*tensors))
    assert compiled == []


def _loss(function):
    return lambda q, k, v: function(q, k, v, normalizer="add", eps=0.5).square().sum()


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 2), (None, None, 0)])
def test_vmap_of_value_and_gradient(in_dims):
    base = [torch.rand(s, dtype=f64) for s in ((3, 5, 4), (3, 6, 4), (3, 6, 2))]
    tensors = [t[0] if d is None else t.movedim(0, d) for t, d in zip(base, in_dims, strict=True)]
    for transform in (lambda f: f, lambda f: grad(f, argnums=(0, 1, 2))):
        ours = vmap(transform(_loss(operator)), in_dims)(*tensors)
        exact = vmap(transform(_loss(plain)), in_dims)(*tensors)
        torch.testing.assert_close(ours, exact)


def test_gradient_of_vmap_and_nested_transforms():
    q, k, v = (torch.rand(3, 5, 4, dtype=f64) for _ in range(3))
    for transform in (
        lambda f: grad(lambda k: vmap(f, (0, 0, 0))(q, k, v).sum()),
        lambda f: grad(lambda k: grad(f)(q, k, v).square().sum()),
        lambda f: lambda k: jacrev(grad(f, argnums=1), argnums=1)(q, k, v),
    ):
        torch.testing.assert_close(transform(_loss(operator))(k), transform(_loss(plain))(k))


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
def test_batched_incoming_gradients(normalizer, decoupled):
    """vmap of the backward alone: the saved tensors are unmapped, each sample has its own dk."""
    leaves = _tensors(decoupled)
    do = torch.randn(4, 2, 3, 5, 3, dtype=f64)
    ours, exact = (
        torch.autograd.grad(
            f(*leaves, normalizer=normalizer, eps=0.5), leaves, do, is_grads_batched=True
        )
        for f in (operator, plain)
    )
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(("normalizer", "decoupled"), CASES)
def test_vmap_of_the_backward_operator(normalizer, decoupled):
    tensors = [t.detach() for t in _tensors(decoupled)]
    arguments = {"normalizer": normalizer, "scale": 0.7, "norm_scale": 0.3, "eps": 0.5}
    _, state, key_sum = torch.ops.bla.linear_attention_forward(*tensors, **arguments)
    saved = (*tensors, *(None,) * (6 - len(tensors)), state, key_sum)
    needs = [i < len(tensors) for i in range(6)]

    def f(do):
        grads = torch.ops.bla.linear_attention_backward(do, *saved, **arguments, needs=needs)
        return grads[: len(tensors)]

    do = torch.randn(4, 2, 3, 5, 3, dtype=f64)
    looped = tuple(torch.stack(g) for g in zip(*map(f, do), strict=True))
    torch.testing.assert_close(vmap(f)(do), looped)


def test_vmap_moves_the_out_order_along():
    q, k, v = (torch.rand(2, 3, 5, 4) for _ in range(3))
    out = vmap(lambda q, k, v: operator(q, k, v, out_order=[1, 0, 2]))(q, k, v)
    torch.testing.assert_close(out, plain(q, k, v))
    assert out.permute(0, 2, 1, 3).is_contiguous()


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_change_the_operator(compiled):
    q, k, v = (torch.rand(2, 40, 16) for _ in range(3))
    do = torch.randn(2, 40, 16)

    def f(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return operator(q, k, v, normalizer="add", eps=0.5)

    expected = results(operator, (q, k, v), do, normalizer="add", eps=0.5)
    run = torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f
    actual = results(run, (q, k, v), do)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(f, (q, k, v), do)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert torch.equal(inside[name], value), name


def test_second_derivative_under_autocast():
    def second(function, autocast):
        leaf = torch.linspace(0.1, 1, 20).reshape(1, 5, 4).requires_grad_()
        out = function(leaf, leaf, leaf, normalizer="add", eps=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (g,) = torch.autograd.grad(out, leaf, torch.ones_like(out), create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    torch.testing.assert_close(second(operator, True), second(plain, False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_aot_autograd(dynamic):
    def f(q, k, v):
        n = q.shape[-2]
        out = operator(
            q * 2, k, v, normalizer="add", scale=n**-0.5, eps=0.5, out_order=[0, 2, 1, 3]
        )
        return out.transpose(1, 2).flatten(2)

    run = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (5, 9):
        tensors = [torch.rand(2, n, 3, 4, dtype=f64).transpose(1, 2) for _ in range(3)]
        do = torch.randn(2, n, 12, dtype=f64)
        ours, exact = results(run, tensors, do), results(f, tensors, do)
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name], msg=name)


def test_flops():
    q, k, v = torch.rand(2, 3, 10, 4), torch.rand(2, 1, 20, 4), torch.rand(2, 1, 20, 6)
    with FlopCounterMode(display=False) as counter:
        operator(q, k, v)
    assert counter.get_total_flops() == 2 * 4 * 6 * (6 * 10 + 2 * 20)
    with FlopCounterMode(display=False) as counter:
        operator(q, k, v, normalizer="add")
    assert counter.get_total_flops() == 2 * 4 * 6 * (6 * 10 + 2 * 20) + 2 * 60 * 4
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        operator(*leaves).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 6 * (3 * 6 * 10 + 3 * 2 * 20)


def test_cold_import_needs_no_triton(run_python):
    run_python("""
        import sys
        sys.modules["triton"] = None  # importing it fails
        import torch, bla_inductor.ops
        x = torch.rand(1, 5, 4, requires_grad=True)
        torch.ops.bla.linear_attention(x, x, x, normalizer="add").sum().backward()
        assert x.grad.isfinite().all()
        assert not any(name.startswith("triton.") for name in sys.modules)
    """)
