"""The index algebra: what every tensor of a graph is, independent of how it was spelled."""

from bla_inductor.algebra.apart import apart
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
from bla_inductor.algebra.observation import Body, Observation, Opaque
from bla_inductor.algebra.observe import observe
from bla_inductor.algebra.term import (
    Delta,
    Factor,
    Guard,
    Leaf,
    Mask,
    Origin,
    Read,
    Term,
    Value,
)
from bla_inductor.algebra.tiles import SLICE

__all__ = [
    "SLICE",
    "Axes",
    "Axis",
    "Body",
    "Delta",
    "Factor",
    "Guard",
    "Index",
    "Inexpressible",
    "Leaf",
    "Mask",
    "Observation",
    "Opaque",
    "Origin",
    "Read",
    "Size",
    "Term",
    "Value",
    "apart",
    "axis_size",
    "equal",
    "observe",
    "product",
    "refine",
]
