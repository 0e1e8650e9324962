"""When the rewrite pays.

Linear attention moves bytes: fused, q, k, v are read once and the result is written once. The
order of the contraction decides the arithmetic: (N + M)·D·Dv multiply-adds a head when the state is
formed first, N·M·(D + Dv) when the N × M matrix is.
"""

from __future__ import annotations

from dataclasses import dataclass

from bla_inductor.ops.layout import ROW

__all__ = ["KERNEL_LIMIT", "Decision", "Problem", "decide"]

KERNEL_LIMIT = 256  # the largest head dim (of q and k, and of v) that the Triton kernels take


_FAST_HEAD_DIM = 128  # beyond, `Problem.wide` says which pay, where q has so many bytes:
_LEAST_WIDE = 4 << 20  # H100, bf16, D = 160: 1.07 times Inductor's step at 5 MiB, 0.77 at 1.25
_FAST_FLOAT32_HEAD_DIM = 64
# An operand with its channels first is copied, and in training its gradient. Without a normaliser
# and without gradients there is less to win: it pays for one copy, or for two where the naive graph
# writes and reads a feature map that the kernels evaluate. H100, inference between conv1d: 0.95 to
# 1.08 times Inductor's speed with three copies, 0.98 to 1.2 with two; training 1.09 to 2.3, after a
# grouped convolution 1.00 to 1.13.
_MOST_COPIES = 3
_MOST_COPIES_UNNORMALISED = 1
_ALWAYS = "options={'rewrite': 'always'} overrides this"
_INSIDE = {"scores": "matrix of scores q·kᵀ", "state": "state kᵀv"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes (hints, where symbolic): `batch` heads in all, queries, keys, feature and value
    channels.
    """

    batch: int
    n: int
    m: int
    c: int
    d: int
    quadratic: bool  # written as (qkᵀ)v
    normalised: bool
    device: str
    itemsize: int
    gradients: bool = False  # it will be differentiated
    float32: str = ""  # torch.get_float32_matmul_precision(), for fp32 operands
    copied: int = 0  # operands with their channels apart in memory, which a loop more copies
    mapped: int = 0  # those of the copied with a feature map that the kernels evaluate
    upcast: bool = False  # 16-bit tensors contracted in fp32, which is slow without the kernels
    wide: bool = False  # head dims above 128 for which there are fast kernels
    bfloat16_products: bool = False  # in bfloat16 on a CPU that has instructions for it
    alive: str = ""  # a product inside that other code reads too: "scores", "state", "numerator"

    def linear_flops(self) -> int:
        return 2 * self.batch * (self.n + self.m) * self.c * self.d

    def quadratic_flops(self) -> int:
        return 2 * self.batch * self.n * self.m * (self.c + self.d)

    def fast_wide(self) -> bool:
        return self.wide and self.itemsize * self.batch * self.n * self.c >= _LEAST_WIDE

    def many_copies(self) -> bool:
        inference = not self.normalised and not self.gradients
        many = inference and self.copied - min(self.mapped, 1) > _MOST_COPIES_UNNORMALISED
        return many or self.copied > _MOST_COPIES

    def fused_bytes(self) -> int:
        """q, k, v read and the result written, once each."""
        return self.itemsize * self.batch * (self.n + self.m) * (self.c + self.d)


@dataclass(frozen=True, slots=True)
class Decision:
    pays: bool
    reason: str


def decide(p: Problem) -> Decision:
    """Whether to rewrite, and the reason in words."""
    if p.device == "cuda" and max(p.c, p.d) > KERNEL_LIMIT:
        return Decision(
            False, f"head dims of {p.c} and {p.d}: the kernels take at most {KERNEL_LIMIT}"
        )
    if p.device == "cuda" and max(p.c, p.d) > _FAST_HEAD_DIM and not p.fast_wide():
        return Decision(
            False,
            f"head dims of {p.c} and {p.d}: above {_FAST_HEAD_DIM} the kernels are faster than "
            "Inductor's GEMMs only in bfloat16 (float16: inference, to 192), on an H100 or H200, "
            f"from {_bytes(_LEAST_WIDE)} a tensor on, for equal head dims, multiples of 16, "
            "with a result of their dtype, without key weights, with elementwise feature maps that "
            f"the normaliser shares, and not launched from C++. {_ALWAYS}",
        )
    if p.device == "cuda" and (p.c * p.itemsize % ROW or p.d * p.itemsize % ROW):
        return Decision(
            False,
            f"head dims of {p.c} and {p.d}: not multiples of {ROW // p.itemsize}, so the kernels "
            f"would copy q, k and v into padded rows first. {_ALWAYS}",
        )
    if p.device == "cuda" and not p.quadratic and not p.upcast and p.many_copies():
        return Decision(
            False,
            f"{p.copied} of its tensors have their channels apart in memory (channels first), "
            f"so the kernels would copy them, which takes longer than what they save. {_ALWAYS}",
        )
    wide = max(p.c, p.d) > _FAST_FLOAT32_HEAD_DIM
    if p.device == "cuda" and p.gradients and p.float32 == "highest" and wide:
        return Decision(
            False,
            f"float32 at matmul precision 'highest', head dims above {_FAST_FLOAT32_HEAD_DIM}: the "
            "backward kernels are slower than Inductor's; "
            f"torch.set_float32_matmul_precision('high') makes them faster. {_ALWAYS}",
        )
    if not p.normalised and p.m <= max(p.c, p.d):
        return Decision(
            False,
            f"a product of three matrices with no long axis: it sums over M={p.m}, and the state "
            f"is {p.c}×{p.d}, no smaller than what it is made of. {_ALWAYS}",
        )
    if p.alive == "scores" or (p.alive == "state" and not p.normalised):
        return Decision(
            False,
            f"its {_INSIDE[p.alive]} is read by other code as well, so it would be computed twice. "
            f"{_ALWAYS}",
        )
    if p.alive == "numerator" and not p.normalised:
        return Decision(
            False,
            "the product that it is a slice of is read by other code as well: that is replaced as "
            f"a whole, where that pays. {_ALWAYS}",
        )
    if p.alive == "numerator":
        return Decision(
            False,
            "its numerator is read by other code as well, so the division stays outside the "
            f"operator: the numerator alone is replaced, where that pays. {_ALWAYS}",
        )
    if p.bfloat16_products and not p.quadratic:
        return Decision(
            False,
            "bfloat16 on a CPU that multiplies it: Inductor's products are in bfloat16, and the "
            f"operator's in float32, which takes longer. {_ALWAYS}",
        )
    gain = p.quadratic_flops() / max(p.linear_flops(), 1)
    if p.quadratic and p.device == "cuda" and gain < 1:
        return Decision(
            False,
            f"written as (qkᵀ)v with N={p.n}, M={p.m} against D={p.c}, Dv={p.d}: that order takes "
            f"{1 / gain:.1f}× fewer FLOPs than q(kᵀv), so it stays. "
            f"{_ALWAYS}",
        )
    if p.quadratic and gain > 1:
        return Decision(True, f"q(kᵀv) instead of (qkᵀ)v: {gain:.1f}× fewer FLOPs, no N×M matrix")
    return Decision(True, f"q, k, v read and the result written once: {_bytes(p.fused_bytes())}")


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"
