from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica
from policies.registry import register
from policies.request import Request


@register("autoscaler", "fixed")
class Fixed:
    """As many replicas as there are from the start on; one that fails is not replaced.

    Is never asked, so it costs nothing.
    """

    every_ns = 0

    def scale(self, replicas: Sequence[Replica], num_starting: int, now: int) -> int:
        return len(replicas) + num_starting

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """Nothing is measured."""
