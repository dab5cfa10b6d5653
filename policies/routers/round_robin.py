from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request


@register("router", "round_robin")
class RoundRobin:
    """The replicas in turn. O(1)."""

    def __init__(self) -> None:
        self._next = 0

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        replica = replicas[self._next % len(replicas)]
        self._next += 1
        return Route(replica.id)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """Turns do not depend on it."""
