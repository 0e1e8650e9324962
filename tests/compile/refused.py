"""Programs that are left as they are, in whole or in part, each with the words of its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

Shape = tuple[int, ...]
BHND: Shape = (2, 3, 20, 8)
ND: Shape = (50, 8)


@dataclass(frozen=True)
class Program:
    """A function, its arguments, a piece of the reason, and how many matches there still are."""

    function: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    reason: str
    matches: int


PROGRAMS: list[Program] = []


def program(
    reason: str,
    *shapes: Shape,
    matches: int = 0,
    inputs: Callable[[], list[Tensor]] | None = None,
) -> Callable[[Any], Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        sizes = shapes or (BHND,) * 3
        make = inputs or (lambda: [torch.randn(s) for s in sizes])
        PROGRAMS.append(Program(function, make, reason, matches))
        return function

    return add


LONG: Shape = (2, 3, 200, 8)


@program("its state kᵀv is read by other code as well", LONG, LONG, LONG)
def state_normalised(q, k, v):
    """As rows of vᵀk, divided by their sums, it would be attention with 200 features."""
    state = k.exp().mT @ v.exp()
    return q @ (state / state.sum(-2, keepdim=True))


# What no operand can take in


@program("which no one of q, k, v has together", BHND, BHND, BHND, (3, 20, 20))
def position_bias(q, k, v, bias):
    return (q @ k.mT * bias) @ v


@program("which no one of q, k, v has together")
def causal_mask(q, k, v):
    at = torch.arange(q.shape[-2])
    return (q @ k.mT).masked_fill(at[:, None] < at, 0) @ v


@program("is made of the product that it multiplies")
def gate_of_the_state(q, k, v):
    state = k.mT @ v
    return q @ (state * state.sigmoid())


@program("is made of the product that it multiplies")
def mask_of_the_scores(q, k, v):
    scores = q @ k.mT
    return scores.masked_fill(scores < 0.1, 0) @ v


@program("c and d, which no one of q, k, v has together: no operand", BHND, BHND, BHND, (3, 8, 8))
def weights_of_the_state(q, k, v, weights):
    return q @ (k.mT @ v * weights)


@program("c and d, which no one of q, k, v has together: no operand", BHND, BHND, BHND, (3, 8, 8))
def weights_of_the_state_channels_first(q, k, v, weights):
    return (v.mT @ k * weights) @ q.mT


@program("the result is expanded along an axis that no operand has", ND, ND, ND)
def expanded_by_a_product_with_ones(q, k, v):
    return torch.einsum("nc,cd,z->znd", q, k.T @ v, torch.ones(3))


@program("the result is spread over a diagonal", ND, ND, ND, matches=1)
def masked_result(q, k, v):
    diagonal = torch.arange(50)[:, None] == torch.arange(8)
    return torch.where(diagonal, q @ (k.T @ v), 0)


@program("a mask that compares positions along n and m couples those indices")
def all_but_the_diagonal(q, k, v):
    at = torch.arange(q.shape[-2])
    return (q @ k.mT).masked_fill(at[:, None] == at, 0) @ v


@program("a mask keeps the diagonal of the first product alone")
def diagonal_of_the_scores(q, k, v):
    at = torch.arange(q.shape[-2])
    return (q @ k.mT).masked_fill(at[:, None] != at, 0) @ v


@program("a mask keeps the diagonal of the first product alone")
def diagonal_of_the_state(q, k, v):
    return q @ (k.mT @ v * torch.eye(8))


@program("the product is multiplied by zero")
def multiplied_by_zero(q, k, v):
    return q @ ((k * 0.0).mT @ v)


@program("a number is added to the product kᵀv before the product with q; write q @ (k.mT @ v) +")
def number_added_to_the_state(q, k, v):
    return q @ (k.mT @ v + 1.0)


@program("a number is added to the scores q·kᵀ before the product with v; write q @ (k.mT @ v) +")
def number_added_to_the_scores(q, k, v):
    return (1 + q @ k.mT) @ v / (k.shape[-2] + q @ k.sum(-2).unsqueeze(-1))


@program("a number bounds the product kᵀv before the product with q")
def clamped_state(q, k, v):
    return q @ (k.mT @ v).clamp(min=0)


@program("a number bounds the scores q·kᵀ before the product with v")
def clamped_scores(q, k, v):
    return (q @ k.mT).clamp(min=0) @ v


# The divisor


@program("adds a term to the numerator before the division", matches=1)
def term_beside_the_numerator(q, k, v):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v) + 20 * v) / (q @ k.sum(-2).unsqueeze(-1) + 20)


@program("adds a term to the numerator before the division", matches=1)
def term_added_in_place(q, k, v):
    q, k = q.relu(), k.relu()
    out, z = q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)
    out += 20 * v
    z += torch.full_like(z, 20)
    return out / z


@program("torch.cat((q1, q2), -1) and torch.cat((k1, k2), -1)", matches=2)
def products_with_the_same_values(q, k, v):
    q1, k1, q2, k2 = q.relu(), k.relu(), (-q).relu(), (-k).relu()
    z = q1 @ k1.sum(-2).unsqueeze(-1) + q2 @ k2.sum(-2).unsqueeze(-1)
    return (q1 @ (k1.mT @ v) + q2 @ (k2.mT @ v)) / z.clamp(min=1e-2)


@program(
    ": in it, `l_args_3_` couples the indices n and m", BHND, BHND, BHND, (3, 20, 20), matches=1
)
def bias_in_the_normaliser(q, k, v, bias):
    return q @ (k.mT @ v) / ((q @ k.mT * bias).sum(-1, keepdim=True) + 1)


@program("add it to the product instead, q·Σk + eps", matches=1)
def eps_added_to_the_key_sum(q, k, v):
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ (k.sum(-2) + 1e-6).unsqueeze(-1))


@program("is not a sum of q·k over the keys", matches=1)
def divisor_of_something_else(q, k, v):
    return q @ (k.mT @ v) / ((q * v).sum(-1, keepdim=True) + 30)


@program("comes between Σ q·k and the division", matches=1)
def root_of_the_normaliser(q, k, v):
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1).sqrt()


@program("a mask that compares positions decides what it sums", matches=1)
def normaliser_without_some_keys(q, k, v):
    head_at_key = torch.arange(3)[:, None, None] == torch.arange(20)
    z = (q @ k.mT).masked_fill(head_at_key, 0).sum(-1, keepdim=True)
    return q @ (k.mT @ v) / (z + 30)


@program("every query has keys of its own in it", BHND, BHND, BHND, (20, 5, 8), matches=1)
def normaliser_over_each_querys_own_keys(q, k, v, neighbours):
    z = (q.unsqueeze(-2) * neighbours).sum((-2, -1))
    return q @ (k.mT @ v) / (z + 30).unsqueeze(-1)


@program("a divisor inside one operator cannot be separated from it")
def scores_that_sum_to_one_over_the_queries(q, k, v):
    return F.normalize(q.relu() @ k.relu().mT, p=1.0, dim=-2) @ v


@program("the normaliser sums over another sequence than the numerator", ND, (8, 8), (8, 8), (9, 8))
def normaliser_of_other_keys(q, k, v, others):
    return q @ (k.T @ v) / (q @ others.sum(0)[:, None] + 30)


# What would not pay


@program("a product of three matrices with no long axis", (64, 32), (32, 4), (4, 32))
def low_rank_projection(x, a, b):
    return x @ a @ b


@program("its state kᵀv is read by other code as well")
def state_returned(q, k, v):
    state = k.mT @ v
    return q @ state, state


@program("its matrix of scores q·kᵀ is read by other code as well")
def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores @ v, scores


@program("so the division stays outside the operator", (4, 8, 8), (4, 8, 8), (4, 8, 8))
def numerator_returned_that_is_left_as_well(q, k, v):
    out = q @ (k.mT @ v)
    return out / (q @ k.sum(-2).unsqueeze(-1) + 30.0), out


@program("so the division stays outside the operator", matches=1)
def numerator_returned(q, k, v):
    out = q @ (k.mT @ v)
    return out / (q @ k.sum(-2).unsqueeze(-1) + 30.0), out


@program("the product that it is a slice of is read by other code as well", ND, ND, ND, matches=1)
def slice_of_a_product_that_is_returned(q, k, v):
    wide = q @ (k.T @ F.pad(v, (0, 1), value=1.0))
    return wide[..., :-1] * 2, wide


# What cannot be said in the graph


@program("write it out of place (x = x + y instead of x += y)")
def query_modified_in_between(q, k, v):
    q = q.relu()
    scores = q @ k.mT
    q.mul_(3.0)
    return scores @ v + q


@program(
    "is modified in place later, and its gradient needs it",
    inputs=lambda: [torch.randn(BHND, requires_grad=True) for _ in range(3)],
)
def query_modified_afterwards(q, k, v):
    q = q.relu()
    out = q @ (k.mT @ v)
    return out, q.mul_(3.0)


@program("it is a view of a tensor that is modified in place later", ND, ND, ND, matches=1)
def slice_that_is_written(q, k, v):
    out = (q @ (k.T @ F.pad(v, (0, 1), value=1.0)))[..., :-1]
    out.add_(1)
    return out


@program("what is added to it in the same operator cannot be separated from it", ND, ND, ND, ND)
def added_in_another_dtype(x, q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.addmm(x, q, k.T @ v)


@program("its result has strides that no kernel writes", ND, ND, ND, matches=1)
def slice_of_a_wider_product(q, k, v):
    return (q @ (k.T @ F.pad(v, (0, 1), value=1.0)))[..., :-1]


@program("it is written into memory that other tensors hold", ND, ND, ND, ND)
def written_into_an_input(q, k, v, out):
    return out.addmm_(q, k.T @ v)


@program("its result is reshaped in place later", ND, ND, ND)
def reshaped_in_place(q, k, v):
    out = q @ (k.T @ v)
    out.unsqueeze_(0)
    return out


@program("random numbers that it does not need are drawn inside", ND, ND, ND, matches=1)
def drawn_and_sliced_off(q, k, v):
    return (q @ (k.T @ torch.cat((v, torch.randn(50, 1)), -1)))[..., :-1] * 2


@program(
    "none of q, k, v is a floating-point tensor",
    inputs=lambda: [torch.ones(ND, dtype=torch.long)] * 3,
)
def integers(q, k, v):
    return q @ (k.T @ v)


@program(
    "the operator takes fp16, bf16, fp32 and fp64",
    inputs=lambda: [torch.randn(ND).to(torch.float8_e4m3fn)] * 3,
)
def eight_bits(q, k, v):
    return q.float() @ (k.float().T @ v.float())


@program(
    "an input is a TwoTensor, which is not looked into",
    inputs=lambda: [TwoTensor(torch.randn(ND), torch.randn(ND)) for _ in range(3)],
)
def tensor_subclass(q, k, v):
    return q @ (k.T @ v)


@program("compile the inner function")
def mapped(q, k, v):
    return torch.vmap(lambda q, k, v: q @ (k.mT @ v))(q, k, v)


# Nothing matched, and what came nearest


@program("scaled_dot_product_attention is softmax attention")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@program("a softmax stands between the two products")
def softmax_attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@program("put it on the output, or call model.eval()")
def dropout_on_the_scores(q, k, v):
    return F.dropout(q @ k.mT) @ v


@program("`tanh` stands between the two products")
def nonlinear_state(q, k, v):
    return q @ torch.tanh(k.mT @ v)


@program("`add` adds a tensor to the first product", BHND, BHND, BHND, (3, 8, 8))
def bias_on_the_state(q, k, v, bias):
    return q @ (k.mT @ v + bias)


@program("solve_ex` stands between the two products")
def one_of_several_results(q, k, v):
    return q @ torch.linalg.solve(k.mT @ k + torch.eye(8), k.mT @ v)


@program("adds up products (of chunks of the keys, say)")
def features_of_chunks(q, k, v):
    state = sum(a.relu().mT @ b for a, b in zip(k.chunk(4, 2), v.chunk(4, 2), strict=True))
    return q @ state


@program("sums over an axis that q, k and v all have (the heads, say)")
def heads_summed_in_the_product(q, k, v):
    return torch.einsum("bhnd,bhde->bne", q, torch.einsum("bhmd,bhme->bhde", k, v))


@program("the first product is written into another tensor (x[i] = …)")
def states_written_one_by_one(q, k, v):
    state = q.new_zeros(2, 3, 8, 8)
    for head in range(3):
        state[:, head] = k[:, head].mT @ v[:, head]
    return q @ state


@program("a number bounds Σk before the product with q", matches=1)
def sum_of_keys_clamped(q, k, v):
    q, k = q.relu(), k.relu()
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1).clamp_min(1e-8))


@program("a slice of the product is divided by another slice", matches=1)
def column_of_ones_assigned(q, k, v):
    wide = v.new_ones(2, 3, 20, 9)
    wide[..., :8] = v
    out = q.exp() @ (k.exp().mT @ wide)
    return out[..., :8] / (out[..., 8:] + 1e-6)
