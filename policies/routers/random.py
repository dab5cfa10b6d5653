from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request


@register("router", "random")
class Random:
    """A replica at random, all equally likely. O(1).

    The draw is keyed by the request, so that one more request changes nobody else's. Splits a Poisson stream of rate
    lambda into independent ones of lambda / R: what other routers are measured against.
    """

    def __init__(self, seed: int = 0) -> None:
        self._stream = RandomStream(seed, "random router")

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        return Route(replicas[self._stream.below(len(replicas), request.id)].id)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """Draws do not depend on it."""
