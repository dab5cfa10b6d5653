from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight


@register("router", "session")
class Session:
    """Every session stays with the replica of its first request, where its earlier turns are cached.

    A request without a session, a session's first one, and one whose replica takes no requests any more go to the
    replica with the fewest requests (waiting and running, the router's own count or the reported one, whichever is
    larger; ties to the lowest id), where the session then stays. Sessions never move for load: see `consistent_hash`
    for affinity with a bound. The `max_sessions` most recently seen are remembered. O(R).
    """

    def __init__(self, max_sessions: int = 100_000) -> None:
        if max_sessions < 1:
            raise ValueError(f"max_sessions must be at least 1, not {max_sessions}")
        self._max_sessions = max_sessions
        self._homes: OrderedDict[int, int] = OrderedDict()
        self._in_flight = InFlight()

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        session = request.session
        chosen = None if session is None else self._homes.get(session)
        if chosen is None or all(replica.id != chosen for replica in replicas):
            chosen = self._in_flight.least_loaded(replicas)
        if session is not None:
            self._homes[session] = chosen
            self._homes.move_to_end(session)
            if len(self._homes) > self._max_sessions:
                self._homes.popitem(last=False)
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)
