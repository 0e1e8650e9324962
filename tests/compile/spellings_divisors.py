"""Normalisers, what guards them, and what is added beside numerator and normaliser.

Where `reason` is given the numerator alone is replaced, and the report says why.
"""

import torch
import torch.nn.functional as F

from tests.compile.further import further, near_miss
from tests.compile.spellings import B, D, H, N, elu1

BND, LONG = (B, N, D), (40, 2, D)


def phi(*tensors):
    return [elu1(x) for x in tensors]


# Numbers in other words.


@further(normalised=True)
def eps_as_a_tensor(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + torch.tensor(1e-3))


@further(normalised=True)
def eps_as_a_new_tensor(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / torch.maximum(q @ k.sum(-2).unsqueeze(-1), q.new_tensor(1e-2))


@further(normalised=True)
def eps_of_the_dtype(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(-2).unsqueeze(-1)
    return q @ (k.mT @ v) / z.clamp(min=torch.tensor(torch.finfo(q.dtype).eps))


@further(normalised=True)
def clamped_to_infinity(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1)).clamp(1e-2, float("inf"))


@further(normalised=False, reason="`clamp` comes between")
def clamped_on_both_sides(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1)).clamp(1e-2, 1e3)


@further(normalised=True)
def eps_written_in_place(q, k, v):
    eps = torch.tensor(0.5)
    eps.mul_(2.0)
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + eps)


@further(normalised=True)
def eps_subtracted(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) - (-1e-3))


@further(BND, BND, BND, normalised=True)
def eps_by_baddbmm(q, k, v):
    q, k = phi(q, k)
    eps = torch.full((1, 1, 1), 1e-3, dtype=q.dtype)
    return torch.bmm(q, torch.bmm(k.mT, v)) / torch.baddbmm(eps, q, k.sum(1).unsqueeze(-1))


# The division at another place.


@further(normalised=True)
def queries_divided_first(q, k, v):
    q, k = phi(q, k)
    return (q / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)) @ (k.mT @ v)


@further(normalised=True)
def queries_divided_first_quadratic(q, k, v):
    q, k = phi(q, k)
    return ((q * (1 / (q @ k.sum(-2).unsqueeze(-1)))) @ k.mT) @ v


@further()
def features_normalised_over_the_keys(q, k, v):
    k = elu1(k)
    return q @ ((k.mT @ v) / k.sum(-2).unsqueeze(-1))


@further(normalised=True)
def divided_twice(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(-2).unsqueeze(-1) + 1e-3
    return q @ (k.mT @ v) / z / z


@further((B, 4, 16, D), (B, 4, 16, D), (B, 4, 16, D), normalised=True)
def states_of_groups_added_up(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(2, keepdim=True).sum(1, keepdim=True).mT
    return q @ (k.mT @ v).sum(1, keepdim=True) / (z + 1e-6)


# Divisors that are not the operator's: the numerator alone.


@further(normalised=False, reason="a number is added to Σk before the product")
def eps_inside_the_product(q, k, v):
    q, k = phi(q, k)
    z = torch.einsum("bhnc,bhc->bhn", q, k.sum(-2) + 1e-3)
    return q @ (k.mT @ v) / z.unsqueeze(-1)


@further(normalised=False, reason="a number is added to Σk before the product")
def eps_inside_and_no_numerator_of_its_own(q, k, v):
    q, k = phi(q, k)
    z = 1 / torch.einsum("bhnc,bhc->bhn", q, k.sum(-2) + 1e-3)
    return torch.einsum("bhnc,bhcd,bhn->bhnd", q, torch.einsum("bhmc,bhmd->bhcd", k, v), z)


@further(normalised=False, reason="`where` comes between Σ q·k and the division")
def zero_divisors_replaced(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(-2).unsqueeze(-1)
    return q @ (k.mT @ v) / torch.where(z > 0, z, torch.ones_like(z))


@further(normalised=False, reason="`masked_fill` comes between")
def zero_divisors_filled(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(-2).unsqueeze(-1)
    return q @ (k.mT @ v) / z.masked_fill(z == 0, 1.0)


@further(normalised=False, reason="`clamp` comes between")
def eps_and_a_bound(q, k, v):
    q, k = phi(q, k)
    z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    return q @ (k.mT @ v) / z.clamp(min=1e-2)


@further(normalised=False, reason="`sqrt` comes between")
def square_root_of_the_sum(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1)).sqrt()


@further((B, H, N, D), (B, H, N, D), (B, H, N, D), (), normalised=False, reason="`add` comes")
def eps_that_is_learned(q, k, v, eps):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + eps.exp())


# Something added to the numerator.


@further(LONG, LONG, LONG, normalised=False, reason="adds a term to the numerator")
def self_loop(q, k, v):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    n = q.shape[0]
    numerator = torch.einsum("nhm,hmd->nhd", q, torch.einsum("lhm,lhd->hmd", k, v)) + n * v
    normaliser = torch.einsum("nhm,hm->nh", q, k.sum(0)).unsqueeze(-1)
    return (numerator / (normaliser + torch.ones_like(normaliser) * n)).mean(1)


@further(LONG, LONG, LONG, normalised=False, reason="adds a term to the numerator")
def affine_kernel(q, k, v):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    n = q.shape[0]
    numerator = torch.einsum("nhm,hmd->nhd", q, torch.einsum("lhm,lhd->hmd", k, v))
    normaliser = torch.einsum("nhm,hm->nh", q, k.sum(0)).unsqueeze(-1)
    return (numerator + v.sum(0).unsqueeze(0)) / (normaliser + n)


@further(BND, BND, BND)
def residual_by_baddbmm(q, k, v):
    return torch.baddbmm(v, q, torch.bmm(k.mT, v), beta=0.5, alpha=0.125)


@further(BND, BND, BND, (D,))
def bias_by_baddbmm(q, k, v, bias):
    return torch.baddbmm(bias.view(1, 1, -1), q, torch.bmm(k.mT, v)).relu()


@further((50, D), (60, D), (60, D), (D,))
def bias_by_linear(q, k, v, bias):
    return F.linear(q, v.T @ k / k.shape[0], bias).relu()


@further((B, N, D), (60, D), (60, D), (D,))
def bias_by_linear_of_a_batch(q, k, v, bias):
    return F.linear(q, (v.T @ k).contiguous(), bias * 2)


@further((50, D), (60, D), (60, D), normalised=True)
def eps_by_linear(q, k, v):
    q, k = phi(q, k)
    return F.linear(q, v.T @ k) / F.linear(q, k.sum(0, keepdim=True), k.new_full((1,), 1e-3))


@further((50, D), (50, D), (50, D))
def residual_by_addmm_in_place(q, k, v):
    out = v * 2
    return out.addmm_(q, k.mT @ v, alpha=0.5)


@further(BND, BND, BND)
def state_of_the_batch_by_addbmm(q, k, v):
    return q @ torch.addbmm(torch.zeros(D, D, dtype=q.dtype), k.mT, v)


@further(normalised=True)
def residual_by_addcdiv(q, k, v):
    q, k = phi(q, k)
    return torch.addcdiv(v, q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1) + 1e-6, value=0.5)


@further(normalised=True)
def divisor_repeated_over_the_channels(q, k, v):
    q, k = phi(q, k)
    z = (q @ k.sum(-2).unsqueeze(-1)).repeat(1, 1, 1, v.shape[-1])
    return q @ (k.mT @ v) / (z + 1e-6)


@further(normalised=True)
def divisor_tiled_over_the_channels(q, k, v):
    q, k = phi(q, k)
    return q @ (k.mT @ v) / ((q @ k.sum(-2).unsqueeze(-1)).tile(v.shape[-1]) + 1e-6)


@near_miss("a number is added to the product kᵀv")
def eps_on_the_state(q, k, v):
    return q @ (k.mT @ v + 1e-3)


@near_miss("`add` adds a tensor to the first product", BND, BND, BND)
def bias_on_the_scores(q, k, v):
    return torch.bmm(torch.baddbmm(v.new_ones(1, N, N).tril(), q, k.mT), v)
