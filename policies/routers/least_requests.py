from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight


@register("router", "least_requests")
class LeastRequests:
    """The replica with the fewest requests, waiting and running: join the shortest queue (JSQ).

    Ties go to the lowest id. With fresh figures it is optimal for exponential services (Winston, 1977); with old ones
    everybody goes to whoever looked idle (Mitzenmacher, IEEE TPDS 2000), which the router's own count prevents. O(R).

    `load`: `reported` by the replica, the router's `own` count of what it has sent and not seen end, or the larger of
    `both` (default). Vidur's version counts waiting requests alone, so that a full replica without a queue looks idle;
    here running ones count too, as in other routers (SGLang's, AIBrix's).
    """

    def __init__(self, load: str = "both") -> None:
        self._in_flight = InFlight(load)

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        chosen = self._in_flight.least_loaded(replicas)
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)
