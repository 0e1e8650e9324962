"""States that are added up over chunks of the keys."""

import torch

from tests.compile.further import further, near_miss
from tests.compile.spellings import B, D, H, elu1

CHUNKED = (B, H, 5, 8, D)


def divided(q, state, total):
    return q @ state / (q @ total.unsqueeze(-1) + 1e-6)


@further(normalised=True)
def chunks_added_up(q, k, v):
    q, k = elu1(q), elu1(k)
    state, total = 0, 0
    for a, b in zip(k.chunk(3, 2), v.chunk(3, 2), strict=True):
        state = state + a.mT @ b
        total = total + a.sum(-2)
    return divided(q, state, total)


@further(lengths=False)
def chunks_summed_by_python(q, k, v):
    state = sum(a.mT @ b for a, b in zip(k.split(10, 2), v.split(10, 2), strict=True))
    return q @ state


@further(normalised=True, lengths=False)
def chunks_added_in_place(q, k, v):
    q, k = elu1(q), elu1(k)
    state, total = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D)
    for at in range(0, 20, 8):
        a, b = k[:, :, at : at + 8], v[:, :, at : at + 8]
        state += torch.einsum("bhmc,bhmd->bhcd", a, b)
        total += a.sum(-2)
    return divided(q, state, total)


@further(CHUNKED, CHUNKED, CHUNKED, normalised=True)
def chunks_selected(q, k, v):
    """Every chunk is an entry of an axis of its own; the last comes first."""
    q, k = elu1(q), elu1(k)
    state = sum(k[:, :, i].mT @ v[:, :, i] for i in reversed(range(5)))
    total = sum(chunk.sum(-2) for chunk in k.unbind(2))
    return divided(q.flatten(2, 3), state, total)


@further(lengths=False)
def halves_of_scaled_keys_added_up(q, k, v):
    k = k * 0.5
    return q @ (k[:, :, :10].mT @ v[:, :, :10] + k[:, :, 10:].mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def feature_map_in_the_chunk(q, k, v):
    return q @ (elu1(k[:, :, :10]).mT @ v[:, :, :10] + elu1(k[:, :, 10:]).mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def a_key_left_out(q, k, v):
    return q @ (k[:, :, :9].mT @ v[:, :, :9] + k[:, :, 10:].mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def keys_added_twice(q, k, v):
    return q @ (k[:, :, :11].mT @ v[:, :, :11] + k[:, :, 10:].mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def values_of_the_other_chunk(q, k, v):
    return q @ (k[:, :, :10].mT @ v[:, :, 10:] + k[:, :, 10:].mT @ v[:, :, :10])


@near_miss("adds up products (of chunks of the keys, say)")
def values_of_the_same_chunk(q, k, v):
    return q @ (k[:, :, :10].mT @ v[:, :, 10:] + k[:, :, 10:].mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def chunks_with_weights_of_their_own(q, k, v):
    return q @ (k[:, :, :10].mT @ v[:, :, :10] + 0.5 * k[:, :, 10:].mT @ v[:, :, 10:])


@near_miss("adds up products (of chunks of the keys, say)")
def every_other_key(q, k, v):
    return q @ (k[:, :, ::2].mT @ v[:, :, ::2] + k[:, :, 1::2].mT @ v[:, :, 1::2])


@near_miss("`add` adds a tensor to the first product")
def products_added_twice_as_much(q, k, v):
    first, second = k[:, :, :10].mT @ v[:, :, :10], k[:, :, 10:].mT @ v[:, :, 10:]
    return q @ (torch.add(first, second, alpha=2) + second)
