from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request


@register("router", "weighted_round_robin")
class WeightedRoundRobin:
    """The replicas in turn, each as often as its weight says, spread evenly ("smooth" weighted round robin).

    Every replica has a credit. At each request all get their weight added; the one with the most credit (of equal ones
    the lowest id) takes the request and pays the sum of the weights. Among R replicas that stay, any sum-of-weights
    requests in a row from the start give each exactly its weight, and a heavy one is not served in one burst: weights
    5, 1, 1 give 0 0 1 0 2 0 0. O(R). Source: nginx, upstream round robin (2012).

    `weights`: whole numbers by replica id, with colons: `weights=5:1:1` for replicas 0, 1, 2; others have weight 1. A
    replica that joins starts with no credit, one that leaves loses it.
    """

    def __init__(self, weights: str = "") -> None:
        try:
            self._weights = dict(enumerate(map(int, weights.split(":") if weights else ())))
        except ValueError:
            raise ValueError(f"weights must be whole numbers with colons between them, not {weights!r}") from None
        if any(weight < 1 for weight in self._weights.values()):
            raise ValueError(f"weights must be at least 1, not {weights}")
        self._credit: dict[int, int] = {}

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        weights = {replica.id: self._weights.get(replica.id, 1) for replica in replicas}
        self._credit = {i: self._credit.get(i, 0) + weight for i, weight in weights.items()}
        chosen = max(self._credit, key=lambda i: (self._credit[i], -i))
        self._credit[chosen] -= sum(weights.values())
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """Turns do not depend on it."""
