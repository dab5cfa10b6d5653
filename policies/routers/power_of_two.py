from __future__ import annotations

from collections.abc import Iterator, Sequence

from policies.contract import Replica, Route
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight


@register("router", "power_of_two")
class PowerOfTwo:
    """Of `d` replicas drawn at random the one with the fewest requests, waiting and running.

    With n replicas the longest queue falls from about log n / log log n (d = 1) to log log n / log d: two choices are
    nearly as good as all of them, and far less prone than all to send everybody to one replica when figures are old
    (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001; Vvedenskaya et al., 1996).

    The d candidates differ (the paper draws with replacement; with d = 2 of many replicas that is the same), and their
    draws are keyed by the request. Ties go to the lowest id. `d` = 1 is a random router, `d` = R or more
    `least_requests`. `load`: as in `least_requests`. O(d).
    """

    def __init__(self, d: int = 2, load: str = "both", seed: int = 0) -> None:
        if d < 1:
            raise ValueError(f"d must be at least 1, not {d}")
        self._d = d
        self._stream = RandomStream(seed, "power_of_two")
        self._in_flight = InFlight(load)

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        candidates = replicas
        if self._d < len(replicas):
            candidates = [replicas[i] for i in self._sample(request, len(replicas))]
        chosen = self._in_flight.least_loaded(candidates)
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)

    def _sample(self, request: Request, n: int) -> Iterator[int]:
        """`d` different numbers below n: the first steps of a Fisher-Yates shuffle that notes only what it moves."""
        moved: dict[int, int] = {}
        for i in range(self._d):
            j = i + self._stream.below(n - i, request.id, i)
            yield moved.get(j, j)
            moved[j] = moved.get(i, i)
