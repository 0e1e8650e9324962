"""The operators as Inductor templates, for CUDA.

`forward.forward` and `backward.backward` build Inductor's IR from the kernels of
`bla_inductor.kernels`, inside a lowering; importing them imports Triton. They raise `Unsupported`
for what the templates do not cover.
"""

__all__ = ["Unsupported"]


class Unsupported(Exception):
    """Why the templates do not cover a call; a call of the operator does."""
