from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request


@register("router", "least_tokens")
class LeastTokens:
    """The replica with the fewest outstanding tokens: prompt tokens still to compute, and one a request that decodes.

    Ties go to the lowest replica id. Cost: O(replicas). Source: splitwise-sim, `TokenJSQ` (Patel et al., ISCA 2024).
    """

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        return Route(min(replicas, key=lambda replica: (replica.num_outstanding_tokens, replica.id)).id)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """The load is read from the replicas."""
