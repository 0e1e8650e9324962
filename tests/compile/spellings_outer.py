"""Feature maps that are outer products, of the features with themselves, as in polynomial kernels,
or with another tensor.
"""

import torch

from tests.compile.further import further
from tests.compile.spellings import B, H, elu1

LONG = (B, H, 80, 4)


def squared(x):
    """All products of two features."""
    return torch.einsum("...i,...j->...ij", x, x).flatten(-2)


def attention(q, k, v):
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


@further(normalised=True)
def outer_by_einsum(q, k, v):
    return attention(squared(q), squared(k), v)


@further(LONG, LONG, LONG)
def outer_by_broadcasting(q, k, v):
    q, k = ((x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2 for x in (q, k))
    return q @ (k.mT @ v)


@further(LONG, LONG, LONG)
def outer_not_flattened(q, k, v):
    q, k = (torch.einsum("bhni,bhnj->bhnij", x, x) for x in (q, k))
    return torch.einsum("bhnij,bhijd->bhnd", q, torch.einsum("bhmij,bhmd->bhijd", k, v))


@further(LONG, LONG, LONG, normalised=True)
def outer_of_three(q, k, v):
    q, k = (torch.einsum("...i,...j->...ij", squared(x), x).flatten(-2) for x in map(elu1, (q, k)))
    return attention(q, k, v)


@further(normalised=True)
def outer_quadratic(q, k, v):
    scores = squared(q) @ squared(k).mT
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


@further(LONG, LONG, LONG, (80, 3), normalised=True)
def outer_with_positions(q, k, v, at):
    """Every feature at several frequencies."""
    q, k = ((elu1(x).unsqueeze(-1) * at.exp().unsqueeze(-2)).flatten(-2) for x in (q, k))
    return attention(q, k, v)


@further(normalised=True)
def taylor_series(q, k, v):
    def phi(x):
        return torch.cat([torch.ones_like(x[..., :1]), x, squared(x) * 0.5**0.5], dim=-1)

    return attention(phi(q), phi(k), v)
