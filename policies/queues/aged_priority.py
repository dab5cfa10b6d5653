from __future__ import annotations

from policies.key_queue import KeyQueue
from policies.registry import register
from policies.request import Request


@register("queue", "aged_priority")
class AgedPriority(KeyQueue):
    """Priority with ageing: a request gains one class every `age_s` seconds, so that nobody waits for ever.

    Rank = arrival + priority x age, in nanoseconds. All age at the same rate, so two requests never change places and
    the rank is fixed on arrival. `age_s` (10): 0 is FCFS, a very large one strict priority. A request of priority p
    waits for no higher class's request that arrives more than p x age_s after it. O(log n) an arrival.
    """

    def __init__(self, age_s: float = 10.0) -> None:
        super().__init__()
        if age_s < 0:
            raise ValueError(f"age_s must be 0 or more, not {age_s}")
        self._age_ns = round(age_s * 1e9)

    def rank(self, request: Request) -> float:
        return request.arrival_ns + request.priority * self._age_ns
