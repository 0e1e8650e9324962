"""Linear attention in the ways people write it. Each is our own text of a form found in public
code.

A `Spelling` is a function of q, k, v (and what else it needs), the shapes of its arguments, and how
many matches
are expected. Letters: B batch, H heads, N queries, M keys, D features, E value channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

B, H, N, M, D, E = 2, 3, 20, 20, 8, 8
Shape = tuple[int, ...]
BHND: Shape = (B, H, N, D)


@dataclass(frozen=True)
class Spelling:
    function: Callable[..., Any]
    shapes: tuple[Shape, ...] = (BHND, BHND, BHND)
    matches: int = 1
    dynamic: bool = True

    @property
    def name(self) -> str:
        return self.function.__name__


SPELLINGS: list[Spelling] = []
NEGATIVES: list[Spelling] = []


def spelling(*shapes: Shape, matches: int = 1, dynamic: bool = True) -> Callable[[Any], Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        SPELLINGS.append(Spelling(function, shapes or (BHND,) * 3, matches, dynamic))
        return function

    return add


def negative(*shapes: Shape) -> Callable[[Any], Any]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        NEGATIVES.append(Spelling(function, shapes or (BHND,) * 3, 0))
        return function

    return add


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


# Without a normaliser.


@spelling()
def simple_at(q, k, v):
    return q @ (k.transpose(-2, -1) @ v)


@spelling()
def simple_quadratic(q, k, v):
    return (q @ k.transpose(-2, -1)) @ v * 0.125


@spelling((B, H, N, D), (B, H, 28, D), (B, H, 28, 12))
def simple_cross(q, k, v):
    return torch.matmul(q, torch.matmul(k.mT, v)) / k.shape[-2]


@spelling((B * H, N, D), (B * H, N, D), (B * H, N, D))
def simple_bmm(q, k, v):
    scale = q.shape[1] ** -0.5
    return torch.bmm(q, torch.bmm((k * scale).permute(0, 2, 1), v * scale))


@spelling((50, 8), (60, 8), (60, 12))
def simple_unbatched(q, k, v):
    return q @ (k.t() @ v)


@spelling()
def softmax_features(q, k, v):
    q = q.softmax(-1) * q.shape[-1] ** -0.5
    k = k.softmax(-2)
    context = torch.einsum("bhnd,bhne->bhde", k, v)
    return torch.einsum("bhde,bhnd->bhne", context, q)


@spelling((B, 3 * H * D, 4, 5))
def images_tokens_last(qkv):
    q, k, v = einops.rearrange(qkv, "b (t h c) x y -> t b h c (x y)", t=3, h=H)
    k = k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    out = torch.einsum("bhde,bhdn->bhen", context, q)
    return einops.rearrange(out, "b h c (x y) -> b (h c) x y", x=4)


@spelling((B, 24, N), (B, 24, N), (B, 24, N))
def channels_first_bmm(q, k, v):
    return torch.bmm(torch.bmm(v, k.transpose(1, 2)), q)


@spelling((B, 4, N, D), (B, 4, N, D), (B, 4, N, D))
def groups_and_tokens_summed(q, k, v):
    kv = torch.einsum("bgnd,bgne->bde", k, v) / (4 * N)
    return torch.einsum("bgnd,bde->bgne", q, kv)


@spelling((B, H, N, D), (B, N, D), (B, N, E))
def one_headed_keys(q, k, v):
    return torch.einsum("bhnd,bde->bhne", q, torch.einsum("bnd,bne->bde", k, v))


@spelling((B, 6, N, D), (B, 3, N, D), (B, 3, N, E))
def grouped_keys(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return q @ (k.mT @ v)


@spelling((B, H, N, D), (B, H, N, D), (B, H, N, D), (B, H, N))
def key_weights(q, k, v, w):
    return q @ ((k * w[..., None]).mT @ v)


@spelling((B, H, N, D), (B, H, N, D), (B, H, N, D), (B, H, N, 1))
def value_weights(q, k, v, w):
    return q @ (k.mT @ (v * w))


# Normalised.


@spelling()
def mean_normaliser(q, k, v):
    q, k = elu1(q), elu1(k)
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    n = k.shape[-2]
    return q @ ((k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)) * z


@spelling((B, N, H, D), (B, N, H, D), (B, N, H, D))
def three_operand_einsum(q, k, v):
    q, k = elu1(q), elu1(k)
    kv = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z).contiguous()


@spelling((B, N, H, D), (B, 28, H, D), (B, 28, H, D))
def values_divided_by_length(q, k, v):
    q, k = elu1(q), elu1(k)
    s = v.size(1)
    kv = torch.einsum("nshd,nshv->nhdv", k, v / s)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhdv,nlh->nlhv", q, kv, z) * s


@spelling((B, N, H, D), (B, N, H, D), (B, N, H, D), (B, N), (B, N))
def query_and_key_masks(q, k, v, q_mask, k_mask):
    q_mask, k_mask = q_mask.abs(), k_mask.abs()
    q = elu1(q) * q_mask[:, :, None, None]
    k = elu1(k) * k_mask[:, :, None, None]
    v = v * k_mask[:, :, None, None]
    kv = torch.einsum("nshd,nshv->nhdv", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhdv,nlh->nlhv", q, kv, z)


@spelling()
def row_normalised_quadratic(q, k, v):
    attention = F.relu(q) @ F.relu(k).transpose(-1, -2)
    return (attention / (attention.sum(-1, keepdim=True) + 1e-6)) @ v


@spelling()
def no_eps(q, k, v):
    q, k = elu1(q), elu1(k)
    d_inv = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
    context = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q, d_inv)


@spelling()
def clamped(q, k, v):
    q, k = F.relu(q), F.relu(k)
    z = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return q @ (k.mT @ v) / z.clamp(min=1e-2)


@spelling((N, B * H, D), (N, B * H, D), (N, B * H, D))
def sequence_first_clamp_min(q, k, v):
    q, k = F.relu(q), F.relu(k)
    kv = torch.einsum("nld,nlm->ndm", k.transpose(0, 1), v.transpose(0, 1))
    z = 1 / torch.clamp_min(torch.einsum("nld,nd->nl", q.transpose(0, 1), k.sum(0)), 1e-2)
    out = torch.einsum("nld,ndm,nl->nlm", q.transpose(0, 1), kv, z)
    return out.transpose(0, 1).contiguous().view(-1, B, H * D)


@spelling((B, N, H * D), (B, N, H * D), (B, N, H * D))
def ones_row_on_values(q, k, v):
    q = F.relu(q).transpose(1, 2).unflatten(1, (H, -1)).float()
    k = F.relu(k).transpose(1, 2).unflatten(1, (H, -1)).transpose(2, 3).float()
    v = v.transpose(1, 2).unflatten(1, (H, -1)).float()
    v = F.pad(v, (0, 0, 0, 1), mode="constant", value=1.0)
    out = (v @ k) @ q
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2)


@spelling()
def ones_column_by_cat(q, k, v):
    q, k = elu1(q), elu1(k)
    out = q @ (k.mT @ torch.cat((v, torch.ones_like(v[..., :1])), dim=-1))
    return out[..., :-1] / out[..., -1].unsqueeze(-1)


@spelling((B, 3 * H * D, 30), dynamic=False)
def ones_row_quadratic(qkv):
    q, k, v = qkv.reshape(B, -1, 3 * D, 30).chunk(3, dim=2)
    scores = F.relu(k).transpose(-1, -2) @ F.relu(q)
    scores = scores / (scores.sum(dim=2, keepdim=True) + 1e-15)
    return (v @ scores).reshape(B, -1, 30)


@spelling((B, N, 3 * H * D))
def from_one_projection(qkv):
    q, k, v = qkv.reshape(B, -1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = elu1(q), elu1(k)
    z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    return (q @ (k.mT @ v) / z).transpose(1, 2).reshape(B, -1, H * D)


@spelling()
def decoupled(q, k, v):
    fq, fk = elu1(q), elu1(k)
    rq, rk = fq * torch.cos(q), fk * torch.cos(k)
    z = 1 / (fq @ fk.mean(dim=-2, keepdim=True).mT + 1e-6)
    n = q.shape[-2]
    return rq @ ((rk.mT * n**-0.5) @ (v * n**-0.5)) * z


@spelling((B, N, H * D), (B, N, H * D), (B, N, H * D))
def einops_everywhere(q, k, v):
    q, k, v = (einops.rearrange(x, "b n (h d) -> b h n d", h=H) for x in (q, k, v))
    q, k = q.sigmoid(), k.sigmoid()
    z = einops.einsum(q, k, "b h n d, b h m d -> b h n")
    out = einops.einsum(q, k, v, "b h n d, b h m d, b h m e -> b h n e") / (z[..., None] + 1e-6)
    return einops.rearrange(out, "b h n d -> b n (h d)")


@spelling()
def normaliser_by_ones(q, k, v):
    q, k = elu1(q), elu1(k)
    ones = torch.ones(k.shape[0], k.shape[1], k.shape[2], 1, dtype=k.dtype)
    return q @ (k.mT @ v) / (q @ (k.mT @ ones))


@spelling()
def in_place_division(q, k, v):
    q, k = elu1(q), elu1(k)
    out = q @ (k.mT @ v)
    z = q @ k.sum(-2).unsqueeze(-1)
    z.clamp_min_(1e-2)
    out /= z
    return out


@spelling((B, N, D), (B, N, D), (B, N, D), matches=2)
def two_in_a_row(q, k, v):
    q, k = elu1(q), elu1(k)
    z = q @ k.sum(-2).unsqueeze(-1) + 1e-6
    first = q @ (k.mT @ v) / z
    return q @ (k.mT @ first) / z


@spelling((B, H, N, D), (B, H, N, D), (B, H, N, D), (B, N, H * D))
def residual_and_gate(q, k, v, x):
    q, k = elu1(q), elu1(k)
    out = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
    return x + out.transpose(1, 2).reshape(x.shape) * torch.sigmoid(x)


@spelling((B, 4, 5, H * D), (B, 4, 5, H * D), (B, 4, 5, H * D))
def image_rows_and_columns(q, k, v):
    q, k, v = (x.view(B, 4, 5, H, D) for x in (F.relu(q), F.relu(k), v))
    kv = torch.einsum("bxyhd,bxyhe->bhde", k, v)
    z = torch.einsum("bxyhd,bhd->bxyh", q, k.sum((1, 2))) + 1e-3
    return torch.einsum("bxyhd,bhde->bxyhe", q, kv) / z.unsqueeze(-1)


# Look-alikes that must be left alone.


@negative()
def softmax_attention(q, k, v):
    return torch.softmax(q @ k.mT * D**-0.5, dim=-1) @ v


@negative()
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@negative((B, N, D))
def mlp_without_activation(x):
    return x * x.sum(-1, keepdim=True)


@negative()
def cross_covariance(q, k, v):
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
    return v @ (k.mT @ q).softmax(-1)


@negative()
def causal_mask(q, k, v):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    return ((elu1(q) @ elu1(k).mT) * mask) @ v


@negative()
def causal_by_cumsum(q, k, v):
    kv = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=-3)
    return (q.unsqueeze(-2) @ kv).squeeze(-2)


@negative()
def squared_scores(q, k, v):
    return (q @ k.mT).square() @ v


@negative()
def nonlinear_state(q, k, v):
    return q @ torch.tanh(k.mT @ v)


@negative((B, H, N, D), (B, H, N, D), (B, H, N, D), (H, N, N))
def position_bias(q, k, v, bias):
    return (q @ k.mT * bias) @ v
