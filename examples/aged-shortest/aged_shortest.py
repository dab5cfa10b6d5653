"""Short jobs first, but nobody waits for ever."""

from policies.key_queue import KeyQueue
from policies.request import Request


class AgedShortest(KeyQueue):
    """Smallest work first, where each token counts like having come `ms_per_token` milliseconds later.

    rank = arrival + ms_per_token * (prompt + declared output). All requests age at the same rate, so two of them never
    change places: the rank is fixed on arrival. At 0 it is `fcfs`; the larger it is, the nearer to shortest job first.
    O(log n) an arrival.
    """

    def __init__(self, ms_per_token: float = 10.0) -> None:
        super().__init__()
        if ms_per_token < 0:
            raise ValueError(f"ms_per_token must be 0 or more, not {ms_per_token}")
        self._ns_per_token = ms_per_token * 1e6

    def rank(self, request: Request) -> float:
        work = request.num_prompt_tokens + request.hints.get("output_tokens", request.max_tokens)
        return request.arrival_ns + self._ns_per_token * work
