"""`torch.compile(model, backend="bla")`: fused bidirectional linear attention, found in the user's own code."""

from bla_inductor._version import __version__

__all__ = ["__version__"]
