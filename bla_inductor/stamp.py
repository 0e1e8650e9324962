"""Makes Inductor's caches notice when bla changes.

FxGraphCache and AOTAutogradCache hash the graph and Inductor's configuration, but neither the
lowerings nor the backward of an operator defined elsewhere: after an upgrade of bla, a second
process would be served code of the old one. They do hash the `uuid()` of custom passes. So our pass
carries a hash of bla's sources and of the options; what it does to the graph is in `powers.py`,
`images.py`, `packing.py`, `placing.py`, `copies.py` and `kept.py`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import pathlib
from dataclasses import astuple
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from bla_inductor.compat import inference_aware_pass
from bla_inductor.copies import remove_copies
from bla_inductor.failures import warn_once
from bla_inductor.images import lay_channels_last
from bla_inductor.kept import keep_layouts
from bla_inductor.options import Options
from bla_inductor.packing import pack_gradients
from bla_inductor.placing import place_gradients
from bla_inductor.powers import powers_by_logarithm

# The name of the configuration key under which Inductor is given the stamp.
SLOT = "post_grad_custom_pre_pass"

log = logging.getLogger(__name__)

_PACKAGES = ("bla_inductor", "bla_inductor.patterns", "bla_inductor.kernels")
_InferenceAware = inference_aware_pass()
_Pass: Any = _InferenceAware or CustomGraphPass


class CacheStamp(_Pass):
    """The stamp, and around it the passes that the user has in the same slot.

    Inductor before 2.13 takes one pass there and not a list, so theirs run inside ours.
    """

    def __init__(self, options: Options, users: Any = None):
        self.options = options
        if users is None:
            users = ()
        self.users: tuple[Any, ...] = tuple(users) if isinstance(users, list | tuple) else (users,)

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        powers_by_logarithm(graph)
        lay_channels_last(graph)
        pack_gradients(graph)
        place_gradients(graph)
        remove_copies(graph)
        pack_gradients(graph, partly=True)
        keep_layouts(graph)
        for user in self.users:
            aware = _InferenceAware is not None and isinstance(user, _InferenceAware)
            user(*(graph, is_inference) if aware else (graph,))

    def uuid(self) -> Any | None:
        """None, which turns the caches off, when a pass of the user's cannot be identified, or our
        own files cannot be read.
        """
        ids = [user.uuid() if hasattr(user, "uuid") else None for user in self.users]
        if None in ids:
            return None
        try:
            sources = source_hash()
        except OSError as error:
            warn_once(log, "nothing is taken from Inductor's caches", error)
            return None
        return ("bla", sources, astuple(self.options), tuple(ids))


@functools.cache
def source_hash() -> str:
    """A hash of every source file of bla, wherever its packages were installed."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            for path in sorted(pathlib.Path(root).rglob("*.py")):
                name = f"{package}/{path.relative_to(root).as_posix()}"
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
