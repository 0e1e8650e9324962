"""The index algebra: what every tensor of a graph is, independent of how it was spelled."""

from bla_inductor.algebra.index import (
    Axes,
    Axis,
    Index,
    Inexpressible,
    Size,
    axis_size,
    equal,
    product,
    refine,
)
from bla_inductor.algebra.observe import Body, Observation, Opaque, observe
from bla_inductor.algebra.term import Factor, Guard, Leaf, Read, Term, Value

__all__ = [
    "Axes",
    "Axis",
    "Body",
    "Factor",
    "Guard",
    "Index",
    "Inexpressible",
    "Leaf",
    "Observation",
    "Opaque",
    "Read",
    "Size",
    "Term",
    "Value",
    "axis_size",
    "equal",
    "observe",
    "product",
    "refine",
]
