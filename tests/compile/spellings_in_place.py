"""Tensors that a statement fills in part: padding, masking, and scattering by assignment.

`x[i] = y` has no result to name; what it wrote is read as x from there on. All inputs are floats; a
mask is where one of them is positive.
"""

import torch

from bla_inductor.compat import clamp_is_flat_at_its_bounds
from tests.compile.further import further
from tests.compile.spellings import B, D, H, N, elu1

BHND, KEYS = (B, H, N, D), (B, N)
# Where z is the bound, `z > bound` stops the gradient, as torch.clamp does since torch 2.14.
FLAT = clamp_is_flat_at_its_bounds()
REASON = "" if FLAT else "comes between Σ q·k and the division"


def contracted(q, k, v, divided=True):
    """The products by einsum, which reads the tensors as they are: no view comes between."""
    out = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhmd,bhme->bhde", k, v))
    if not divided:
        return out
    z = torch.einsum("bhnd,bhd->bhn", q, torch.einsum("bhmd->bhd", k)) + 1e-6
    return out / z.unsqueeze(-1)


@further(BHND, BHND, BHND, KEYS, normalised=True)
def keys_cleared_by_a_mask(q, k, v, w):
    k = elu1(k)
    k[(w < 0)[:, None].expand(k.shape[:-1])] = 0.0
    return contracted(elu1(q), k, v)


@further(BHND, BHND, BHND, KEYS, normalised=True)
def cleared_before_the_feature_map(q, k, v, w):
    k = 2.0 * k
    k[(w < 0)[:, None].expand(k.shape[:-1])] = -3.0
    return contracted(elu1(q), elu1(k), v)


@further(normalised=True)
def scattered_by_an_index(q, k, v):
    order = torch.arange(k.shape[2]).flip(0)
    keys, values = torch.zeros_like(k), torch.zeros_like(v)
    keys[:, :, order] = elu1(k)
    values[:, :, order] = v
    return contracted(elu1(q), keys, values)


@further(BHND, BHND, (B, H, N, D), normalised=False)
def values_overwritten_twice(q, k, v):
    """The attention reads what the second statement left."""
    order = torch.arange(k.shape[2]).flip(0)
    values = torch.zeros_like(v)
    values[:, :, order] = v
    values[:, :, order // 2] = 1.0
    return contracted(q, k, values, divided=False)


@further(lengths=False)
def state_assigned(q, k, v):
    state = q.new_zeros(B, H, D, D)
    state[...] = k.mT @ v
    return q @ state


@further()
def heads_summed_after_the_product(q, k, v):
    return (q @ (k.mT @ v)).sum(1)


# Guards of the divisor.


def sums(q, k, v):
    """Numerator and divisor."""
    q, k = elu1(q), elu1(k)
    return q @ (k.mT @ v), q @ k.sum(-2).unsqueeze(-1)


@further(normalised=True)
def small_divisors_assigned(q, k, v):
    out, z = sums(q, k, v)
    z[z < 30.0] = 30.0
    return out / z


@further(normalised=True)
def divisors_of_small_size_assigned(q, k, v):
    out, z = sums(q, k, v)
    z[z.abs() < 1e-1] = 1e-1
    return out / z


@further(normalised=True)
def small_divisors_filled_in_place(q, k, v):
    out, z = sums(q, k, v)
    z.masked_fill_(z < 30.0, 30.0)
    return out / z


@further(normalised=True)
def small_divisors_replaced(q, k, v):
    out, z = sums(q, k, v)
    return out / torch.where(z < 30.0, 30.0, z)


@further(normalised=FLAT, reason=REASON)
def large_divisors_kept(q, k, v):
    out, z = sums(q, k, v)
    return out / torch.where(z > 30.0, z, torch.full_like(z, 30.0))


@further(normalised=FLAT, reason=REASON)
def divisors_not_above_a_number_filled(q, k, v):
    out, z = sums(q, k, v)
    return out / z.masked_fill(z <= 30.0, 30.0)


@further(normalised=True)
def divisors_above_a_small_number_kept(q, k, v):
    out, z = sums(q, k, v)
    return out / torch.where(z > 1e-3, z, 1e-3)


@further(normalised=True)
def small_divisors_clamped_in_place(q, k, v):
    out, z = sums(q, k, v)
    z = z.squeeze(-1)
    z.clamp_(min=30.0)
    return out / z.unsqueeze(-1)


@further(normalised=False, reason="`clamp_` comes between Σ q·k and the division")
def small_divisors_clamped_in_a_view(q, k, v):
    out, z = sums(q, k, v)
    z.squeeze(-1).clamp_(min=30.0)
    return out / z


@further(normalised=False, reason="`index_put_` comes between Σ q·k and the division")
def divisors_of_either_sign_assigned(q, k, v):
    z = q @ k.sum(-2).unsqueeze(-1)
    z[z.abs() < 30.0] = 30.0
    return q @ (k.mT @ v) / z


@further(normalised=False, reason="`masked_fill_` comes between Σ q·k and the division")
def small_divisors_filled_with_another_number(q, k, v):
    out, z = sums(q, k, v)
    z.masked_fill_(z < 30.0, 31.0)
    return out / z


@further(normalised=False, reason="`masked_fill` comes between Σ q·k and the division")
def large_divisors_filled(q, k, v):
    out, z = sums(q, k, v)
    return out / z.masked_fill(z > 30.0, 30.0)


@further(normalised=False, reason="`where` comes between Σ q·k and the division")
def small_divisors_kept(q, k, v):
    out, z = sums(q, k, v)
    return out / torch.where(z < 30.0, z, 30.0)


@further(normalised=False, reason="`where` comes between Σ q·k and the division")
def large_divisors_kept_or_another_number(q, k, v):
    out, z = sums(q, k, v)
    return out / torch.where(z > 30.0, z, 31.0)
