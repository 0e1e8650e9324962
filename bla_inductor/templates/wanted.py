"""The gradients that a call asks for, and the buffers that the kernels write them into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bla_inductor.templates.operands import Node, realized

# The gradients' names in the kernels' text.
NAMES = ("DQ", "DK", "DVALUE", "DQN", "DKN", "DA")


@dataclass
class Wanted:
    """The gradients to be written.

    results: of q … key_weight, None where not needed. written: name → (buffer, its own dims), with
    the batch of the pass that writes it; where that is more than the result's, `sums` says how the
    result comes from it.
    """

    results: list[Node | None] = field(default_factory=lambda: [None] * 6)
    written: dict[str, tuple[Node, int]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.written

    def views(self, *names: str) -> dict[str, Any]:
        """Operands for the buffers of `names`."""
        return {
            name: (realized(self.written[name][0]), self.written[name][1])
            for name in names
            if name in self.written
        }

    def buffers(self, *names: str) -> list[Node]:
        """What the kernel that writes `names` mutates, each buffer once."""
        nodes = [self.written[name][0] for name in names if name in self.written]
        return list({node.get_name(): node for node in nodes}.values())


def needs(wanted: Wanted, *names: str) -> dict[str, bool]:
    parameters = {
        "DQ": "NEED_DQ",
        "DQN": "NEED_DQN",
        "DK": "NEED_DK",
        "DVALUE": "NEED_DV",
        "DKN": "NEED_DKN",
        "DA": "NEED_DW",
    }
    return {parameters[name]: name in wanted for name in names}
