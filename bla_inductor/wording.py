"""A plan in words: its formula in index notation, its sizes, its dtypes."""

from __future__ import annotations

from typing import Any

import sympy

from bla_inductor.algebra import Factor, Guard, Observation, Read, product
from bla_inductor.patterns.feature_maps import capture
from bla_inductor.plan import Operand, Plan

__all__ = ["dtypes", "feature_maps", "formula", "sizes"]

_BATCH = "bhgijkl"


def formula(plan: Plan) -> str:
    """`out[b,h,n,d] = Σ_m Σ_c q[b,h,n,c]·k[b,h,m,c]·v[b,h,m,d] ÷ (… + eps)`, and what q, k and v
    are.
    """
    batch = _BATCH[: len(plan.batch)]

    def read(name: str, operand: Operand, letters: str) -> str:
        present = {i for f in operand.factors for i in f.indices()}
        own = [x for x, i in zip(batch, plan.batch, strict=False) if i in present]
        return f"{name}[{','.join([*own, *letters])}]"

    made = plan.gathered
    weights = [read("w", made.weight, "m")] if made.weight is not None else []
    product_text = "·".join(
        (read("q", made.q, "nc"), read("k", made.k, "mc"), *weights, read("v", made.v, "md"))
    )
    scale = _times(plan.found.scale / (made.q.coef * made.k.coef * made.v.coef))
    text = f"out[{','.join([*batch, *'nd'])}] = {scale}Σ_m Σ_c {product_text}"
    if (z := plan.found.normaliser) is not None and made.q_norm and made.k_norm:
        same_q, same_k = plan.shared
        q = read("q" if same_q else "q'", made.q_norm, "nc")
        k = read("k" if same_k else "k'", made.k_norm, "mc")
        scale = _times(z.scale / (made.q_norm.coef * made.k_norm.coef))
        total = f"{scale}Σ_m Σ_c {'·'.join((q, k, *weights))}"
        if z.kind == "clamp":
            text += f" ÷ max({total}, {_number(z.eps)})"
        else:
            text += f" ÷ ({total}{'' if z.eps == 0 else f' + {_number(z.eps)}'})"
    if plan.found.outer:
        text += " × " + "·".join(map(_factor, plan.found.outer))
    named = {n.replace("_norm", "'"): o for n, o in plan.distinct().items()}
    if made.weight is not None:
        named["w"] = made.weight
    return f"{text}   with " + ", ".join(f"{n} = {_source(o)}" for n, o in named.items())


def feature_maps(plan: Plan) -> str:
    """`q = φ(to_q), φ(x) = …`: the tensors that q and k come from, and the function between."""
    told = []
    for name in ("q", "k"):
        operand = plan.operands[name]
        found = operand.map or capture(operand.factors, operand.columns)
        if found is not None and not found.identity and found.leaf.node is not None:
            told.append(f"{name} = φ({found.leaf.node.name}), φ(x) = {found}")
    return "; ".join(told)


def sizes(plan: Plan, seen: Observation) -> str:
    """`B=2·8 N=1024 M=1024 D=64 Dv=64`, symbolic where the graph is."""
    batch = "·".join(str(i.size) for i in plan.batch) or "1"
    rows = {"N": plan.n, "M": plan.gathered.k.rows, "D": plan.gathered.k.columns, "Dv": plan.d}
    text = " ".join(f"{name}={product(i.size for i in axis)}" for name, axis in rows.items())
    return f"B={batch} {text}"


def dtypes(plan: Plan) -> str:
    """`bfloat16`, or `bfloat16 → float32` where the result is kept in another dtype."""
    inside, outside = (str(d).removeprefix("torch.") for d in (plan.compute_dtype, plan.dtype))
    return inside if inside == outside else f"{inside} → {outside}"


def _source(operand: Operand) -> str:
    if operand.source is not None:
        name = operand.source.node.name
        return name if operand.map is None else f"φ({name})"
    return "·".join(str(leaf) for f in operand.factors for leaf in f.leaves())


def _factor(factor: Factor) -> str:
    """What multiplies the result, with the sums in it and what is added to them."""
    if isinstance(factor, Guard):
        total = f"{_times(factor.term.coef)}{'·'.join(map(_factor, factor.term.factors))}"
        total = f"Σ {total}" if factor.term.bound else total
        if factor.kind == "clamp":
            name = f"max({total}, {_number(factor.eps)})"
        else:
            name = f"({total}{'' if factor.eps == 0 else f' + {_number(factor.eps)}'})"
    else:
        name = "·".join(str(leaf) for leaf in factor.leaves())
    return f"1/{name}" if isinstance(factor, Read | Guard) and factor.power == -1 else name


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(sympy.nsimplify(value))


def _times(coef: Any) -> str:
    return "" if coef == 1 else f"{_number(coef)}·"
