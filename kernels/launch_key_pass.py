"""The backward's launches over the keys: dk, dv, dk', and the gradient of the weights."""

from bla_inductor.kernels import heuristics, launching
from bla_inductor.kernels.batch import Batch
from bla_inductor.kernels.key_pass import key_pass_kernel
from bla_inductor.kernels.large import for_large
from bla_inductor.kernels.launch_forward import apply_state
from bla_inductor.kernels.launching import Map, Numbers, norm_kind
from bla_inductor.kernels.mapping import map_gradient, map_rows
from torch import Tensor


def key_pass(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    dweight: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    dstate: Tensor,
    dsum: Tensor | None,
    precision: str,
    maps: tuple[Map, Map],
) -> None:
    """Write dk, dv, dk_norm, dweight."""
    M, D, DV = k.shape[-2], k.shape[-1], v.shape[-1]
    DN = D if dsum is None else dsum.shape[-1]
    sizes = D, DV, DN, precision, heuristics.capability(k.device)
    tile = heuristics.key_pass_tile(*sizes)
    if k_norm is None and key_weight is None and maps[0].elementwise:
        tile = heuristics.in_two_pieces("key", k.dtype, *sizes) or tile
    if k_norm is None:
        elements = dstate.shape[:-2].numel() * M * D
        tile = for_large(
            "key", tile, sizes[:3], k.dtype, precision, sizes[4], elements,
            (k.stride(-2), v.stride(-2)),
        )  # fmt: skip
    operands = Batch(
        dstate.shape[:-2],
        (k, v, k_norm, launching.weight_column(key_weight), dstate, dsum),
        (dk, dv, dk_norm, dweight),
    )
    rows, chunks = heuristics.divide_rows(M, operands.count, tile, k.device)
    t, s = operands.tensors, operands.strides
    launching.run(
        key_pass_kernel,
        operands.count * chunks,
        *t[:4],
        *t[6:],
        *t[4:6],
        M,
        rows,
        chunks,
        operands.inner,
        *s[0],
        *s[1],
        *s[2],
        *s[3][:3],
        *s[6],
        *s[7],
        *s[8],
        *s[9][:3],
        *s[4][:2],
        *s[5][:2],
        D=D,
        DV=DV,
        DN=DN,
        NORM=norm_kind(dsum is not None, k_norm),
        WEIGHT=launching.weight_kind(key_weight),
        NEED_DK=dk is not None,
        NEED_DV=dv is not None,
        NEED_DKN=dk_norm is not None,
        NEED_DW=dweight is not None,
        K_MAP=maps[0].forward,
        K_MAP_GRAD=maps[0].gradient,
        KN_MAP=maps[1].forward,
        KN_MAP_GRAD=maps[1].gradient,
        PRECISION=precision,
        REST=tile.REST,
        BIG=operands.big(tile.BLOCK_N),
        **launching.blocks(tile),
        tile=tile,
        pdl=True,
    )
    operands.finish()


def key_pass_wide(
    dk: Tensor | None,
    dv: Tensor | None,
    dk_norm: Tensor | None,
    dweight: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    key_weight: Tensor | None,
    dstate: Tensor,
    dsum: Tensor | None,
    precision: str,
    maps: tuple[Map, Map],
) -> None:
    """As `key_pass`, with the output kernel."""
    plain = Numbers("none", 1.0, 1.0, 0.0)
    identity = (Map(), Map())
    batch = dstate.shape[:-2]
    if dk is None and dweight is not None:
        dk = k.new_empty([*batch, *k.shape[-2:]])
    if dk is not None:
        apply_state(
            dk, v, None, dstate.mT, None, dsum if k_norm is None else None, plain, precision,
            identity, key_weight, k, maps[0], dweight,
        )  # fmt: skip
    if dv is not None:
        apply_state(dv, k, None, dstate, None, None, plain, precision, (maps[0], Map()), key_weight)
    if dsum is None or k_norm is None:
        return
    rows = dsum.unsqueeze(-2)
    if dweight is not None:
        dweight += (map_rows(k_norm, maps[1]).float() * rows).sum(-1, keepdim=True)
    if dk_norm is not None:
        if key_weight is not None:
            rows = rows * key_weight.unsqueeze(-1)
        g = rows.expand(dk_norm.shape)
        dk_norm.copy_(map_gradient(k_norm.expand(dk_norm.shape), g, maps[1]))
