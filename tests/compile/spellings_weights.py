"""Projections by matrices that no module owns: arguments, as of functional_call or a closure."""

import torch
import torch.nn.functional as F

from tests.compile.further import further, near_miss
from tests.compile.spellings import B, H, elu1

BNC, WEIGHT, BIAS = (B, 50, 24), (24, 24), (24,)
THREE = (BNC, WEIGHT, WEIGHT, WEIGHT)


def heads(x):
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def attention(q, k, v):
    q, k = elu1(heads(q)), elu1(heads(k))
    return q @ (k.mT @ heads(v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


@further(*THREE, normalised=True)
def projected_by_linear(x, a, b, c):
    return attention(F.linear(x, a), F.linear(x, b), F.linear(x, c))


@further(*THREE, BIAS, normalised=True)
def projected_with_a_bias(x, a, b, c, bias):
    return attention(F.linear(x, a, bias), F.linear(x, b, bias), F.linear(x, c))


@further(*THREE, normalised=True)
def projected_by_matmul(x, a, b, c):
    return attention(x @ a.T, torch.matmul(x, b.mT), x @ c)


@further(*THREE)
def projected_without_heads(x, a, b, c):
    return (x @ a).softmax(-1) @ ((x @ b).softmax(-2).mT @ (x @ c))


@further(BNC, *[(24, H, 8)] * 3)
def projected_by_einsum(x, a, b, c):
    q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (a, b, c))
    return q @ (k.mT @ v)


@further((B, 50, 8), (60, 8), (60, 12))
def keys_and_values_without_a_batch(q, k, v):
    """No weights: the second product comes right after the first."""
    return q @ k.T @ v


@further((50, 8), (60, 8), (60, 12))
def no_batch_at_all(q, k, v):
    return F.linear(F.linear(q, k), v.T)


@near_miss("a softmax stands between", (B, 50, 8), (B, 60, 8), (B, 60, 8), (8, 8))
def softmax_attention_of_projected(q, k, v, w):
    return ((q @ w) @ k.mT).softmax(-1) @ v
