"""Means and sums that multiply queries, keys, values or the state; and what is written twice."""

import torch

from tests.compile.further import further
from tests.compile.spellings import elu1


def attention(q, k, v):
    return q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


@further()
def state_times_a_mean(q, k, v):
    return q @ ((k.mT @ v) * k.abs().mean())


@further()
def queries_times_a_mean_over_tokens(q, k, v):
    q = q * v.mean(-2, keepdim=True)
    return q @ (k.mT @ v)


@further()
def keys_times_a_mean_over_features(q, k, v):
    return q @ ((k * k.mean(-1, keepdim=True)).mT @ v)


@further()
def values_times_sums(q, k, v):
    v = v * q.sum(-2, keepdim=True) * 0.5
    return q @ (k.mT @ v)


@further()
def result_times_sums(q, k, v):
    return q @ (k.mT @ v) * (2 * v.sum((-1, -2), keepdim=True))


@further()
def state_over_a_mean(q, k, v):
    return q @ ((k.mT @ v) / v.exp().mean(-2, keepdim=True))


@further(normalised=True)
def gates_in_the_normaliser(q, k, v):
    q, k = elu1(q), elu1(k)
    gate = k.mean(-2, keepdim=True)
    return attention(q * gate, k * k.mean(-1, keepdim=True), v)


@further()
def straight_through_signs(q, k, v):
    """Keys of one bit, with the gradient of a clamp (Castling-ViT, arXiv 2211.10526)."""
    scale, clamped = k.abs().mean(), k.clamp(0, 1)
    k = ((k > 0).float() * scale).detach() - clamped.detach() + clamped
    return q @ ((k.mT @ v) * scale)


@further(normalised=True)
def ratio_of_norms_times_power(q, k, v):
    """The ratio is no tensor with the power until both are multiplied."""
    q, k = elu1(q), elu1(k)
    norms = q.norm(dim=-1, keepdim=True) / (q**3).norm(dim=-1, keepdim=True)
    return attention(norms * q**3, k, v)


@further(matches=2, normalised=True)
def entries_taken_again(q, k, v):
    """No second tensor for the normaliser: q[i] is q[i]."""
    q, k = elu1(q), elu1(k)
    each = [q[i] @ (k[i].mT @ v[i]) / (q[i] @ k[i].sum(-2).unsqueeze(-1) + 1e-6) for i in range(2)]
    return torch.stack(each)
