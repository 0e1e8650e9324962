"""What the cost rule has to know of a plan: sizes, layouts, and which products stay alive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bla_inductor import compat
from bla_inductor.absorb import dead_without, inside
from bla_inductor.algebra import Index, Observation, Read, Term, Value, product
from bla_inductor.algebra.regions import is_differentiated
from bla_inductor.apart import beside, laid_channels_last, written_apart
from bla_inductor.cost import Problem
from bla_inductor.ops.feature_map import has_rows
from bla_inductor.plan import Plan

__all__ = ["problem"]


def problem(plan: Plan, seen: Observation) -> Problem:
    def size(axis: Sequence[Index]) -> int:
        return seen.hint(product(i.size for i in axis))

    c, d = size(plan.gathered.k.columns), size(plan.d)
    passed = plan.distinct()
    device = seen.tensors[plan.root].device.type
    apart = [o for o in passed.values() if device == "cuda" and not beside(o, seen)]
    gradients = is_differentiated(plan.root)
    last = bool(apart) and gradients and laid_channels_last(plan.root.graph, seen)
    # Inference asks for channels last by other rules; where it does not, copies still paid.
    copied = [o for o in apart if written_apart(o, seen, last or not gradients)]
    narrow = plan.compute_dtype == torch.bfloat16 and not plan.upcast
    return Problem(
        batch=size(plan.batch),
        n=size(plan.n),
        m=size(plan.gathered.k.rows),
        c=c,
        d=d,
        wide=_wide(plan, c, d, seen),
        quadratic=plan.found.quadratic,
        normalised=plan.found.normaliser is not None,
        alive=_alive(plan, seen),
        device=device,
        bfloat16_products=device == "cpu" and narrow and compat.cpu_multiplies_bfloat16(),
        itemsize=plan.compute_dtype.itemsize,
        gradients=gradients,
        upcast=plan.upcast,
        copied=len(copied),
        mapped=sum(o.map is not None for o in copied),
        float32=torch.get_float32_matmul_precision() if plan.compute_dtype == torch.float32 else "",
    )


def _wide(plan: Plan, c: int, d: int, seen: Observation) -> bool:
    """Whether the kernels are fast at head dims c and d above 128."""
    device, passed = seen.tensors[plan.root].device, plan.distinct()
    if device.type != "cuda" or max(c, d) <= 128 or plan.upcast:
        return False
    if plan.dtype != plan.compute_dtype or {"q_norm", "k_norm"} & passed.keys():
        return False
    texts = [o.map.text for o in passed.values() if o.map is not None]
    if any(map(has_rows, texts)) or plan.gathered.weight is not None:
        return False
    from torch._inductor import config

    from bla_inductor.kernels import heuristics, large  # imports Triton

    if config.cpp_wrapper:  # which launches kernels without descriptors
        return False
    capability = heuristics.capability(device)
    gradients = is_differentiated(plan.root)
    return large.pays_above_128(c, d, plan.compute_dtype, capability, gradients)


def _alive(plan: Plan, seen: Observation) -> str:
    """Which product inside stays alive, because nodes outside read it: the costliest one."""
    reads = [node for node, _ in plan.reads]
    alive = inside(plan.root, reads, seen) - dead_without(plan.root, reads, seen)
    kinds = {_kind(plan, seen.values[node]) for node in alive}
    return next((kind for kind in ("scores", "numerator", "state") if kind in kinds), "")


def _kind(plan: Plan, value: Value) -> str:
    """What a tensor inside the attention is, by what it is made of and sums over."""
    term = value.term
    if term.depth < 1 or len(term.factors) < 2:
        return ""
    leaves = {leaf for f in term.factors for leaf in f.leaves()}
    of_q, of_k, of_v = (
        bool(leaves & {leaf for f in o.factors for leaf in f.leaves()})
        for o in (plan.gathered.q, plan.gathered.k, plan.gathered.v)
    )
    matrix = sum(map(len, value.axes)) > len(plan.batch) + 1
    if of_q and of_k and matrix and not _sums_keys(plan, term):
        return "scores"
    if of_q and of_k and matrix and term.depth > 1:
        return "numerator"  # with channels more than v's, where v is a slice
    return "state" if of_k and of_v else ""


def _sums_keys(plan: Plan, term: Term) -> bool:
    """Whether the sequence of the keys is summed over."""
    k = plan.gathered.k.reads[0]
    rows = set(plan.gathered.k.rows)
    places = [at for at, axis in enumerate(k.axes) if rows & set(axis)]
    reads = [f for f in term.factors if isinstance(f, Read) and f.leaf is k.leaf]
    return bool({i for f in reads for at in places for i in f.axes[at]} & set(term.bound))
