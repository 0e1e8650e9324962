"""What stands around the products in whole models: divisions in unusual places and spellings, steps
that only look like a normaliser, and shapes taken from tensors that are replaced.
"""

import torch

from tests.compile.further import further
from tests.compile.spellings import B, D, H, N, elu1

BND, BNHD = (B, N, D), (B, N, H, D)


def parts(q, k, v):
    """Σ q·k·v and Σ q·k."""
    q, k = elu1(q), elu1(k)
    return q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)


# A sum over one entry is a product.


@further(normalised=True)
def divided_by_a_product_of_matrices(q, k, v):
    out, z = parts(q, k, v)
    return (out.unsqueeze(-1) @ (1 / (z + 1e-6)).unsqueeze(-1)).squeeze(-1)


@further(BND, BND, BND, normalised=True)
def divided_by_bmm(q, k, v):
    out, z = parts(q, k, v)
    out, z = out.reshape(-1, D, 1), (z + 1e-6).reshape(-1, 1, 1)
    return torch.bmm(out, z.reciprocal()).reshape(v.shape)


@further(BNHD, BNHD, BNHD, normalised=True)
def divided_by_einsum_of_pairs(q, k, v):
    out, z = parts(*(x.transpose(1, 2) for x in (q, k, v)))
    return torch.einsum("bhndo,bhnoe->bnhde", out[..., None], 1 / (z + 1e-6)[..., None]).squeeze(-1)


# More than one number added.


@further(normalised=True)
def eps_added_twice(q, k, v):
    out, z = parts(q, k, v)
    return out / (z + 1.0 + 1e-3)


@further(normalised=True)
def eps_added_before_and_after_a_scale(q, k, v):
    out, z = parts(q, k, v)
    return out / ((z + 0.5) * 0.25 + 1e-3)


@further(normalised=False, reason="`add` comes between")
def eps_added_to_a_bound(q, k, v):
    out, z = parts(q, k, v)
    return out / (z.clamp(min=1.0) + 1e-6)


@further(normalised=False, reason="adds a term to the numerator")
def two_terms_added(q, k, v):
    out, z = parts(q, k, v)
    n = k.shape[2]
    return (out + v.sum(2, keepdim=True) + n**0.5 * v) / (z + n + n**0.5)


@further()
def number_added_to_the_scores_apart(q, k, v):
    return q @ (k.mT @ v) + 1.0 * v.sum(-2, keepdim=True)


@further()
def number_added_to_the_state_apart(q, k, v):
    return q @ (k.mT @ v) + 1.0 * q.sum(-1, keepdim=True)


# Shapes of tensors that are replaced.


@further(normalised=True)
def zeros_like_the_numerator(q, k, v):
    out, z = parts(q, k, v)
    return torch.where(z > 1e-3, out / (z + 1e-6), torch.zeros_like(out))


@further(normalised=True)
def zeros_of_the_shape_of_the_numerator(q, k, v):
    out, z = parts(q, k, v)
    return torch.cat([out.new_zeros(B, H, 1, D), out / z], dim=2)


# Not a normaliser, and no reason to say so.


@further()
def result_divided_by_its_own_norm(q, k, v):
    out, _ = parts(q, k, v)
    return out / (out.norm(dim=-1, keepdim=True) * D**-0.5).clamp_min(1e-12)


@further()
def one_tensor_divided_by_its_own_norm(x, _k, _v):
    x = elu1(x)
    out = x @ (x.mT @ x)
    return out / out.norm(dim=-1, keepdim=True)


@further(normalised=False, reason="a number is added to Σk before the product")
def eps_added_to_normalised_keys(q, k, v):
    q, k = (x.abs() / x.norm(dim=-1, keepdim=True) for x in (q, k))
    z = torch.einsum("bhnc,bhc->bhn", q, k.sum(-2) + 1e-3)
    return q @ (k.mT @ v) / z.unsqueeze(-1)


@further(normalised=False, reason="adds a term to the numerator")
def eps_added_to_normalised_keys_and_a_term(q, k, v):
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    n = k.shape[2]
    z = n + torch.einsum("bhnc,bhc->bhn", q, k.sum(-2) + 1e-6)
    return torch.einsum("bhnd,bhn->bhnd", v.sum(2, keepdim=True) + q @ (k.mT @ v), 1 / z)
