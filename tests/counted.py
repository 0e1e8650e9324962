"""What `counters["bla"]` says of the graphs, without the statistics of the rules."""

from torch._dynamo.utils import counters


def counted() -> dict[str, int]:
    return {k: v for k, v in counters["bla"].items() if not k.startswith("rule:")}
