from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight, num_uncached_tokens


@register("router", "lmetric")
class LMetric:
    """The smallest product of prompt tokens to compute there and requests there: cache and load without a weight.

        score = new prefill tokens if routed there * batch size

    Both factors are in units that cancel when two replicas are compared: with half the tokens to compute a replica may
    have twice the requests. Source: Zhang et al., "LMetric: Simple is Better - Multiplication May Be All You Need for
    LLM Request Scheduling", arXiv:2603.15202 (2026).

    The paper says that in rare cases the product goes wrong (a prefix that everybody asks for is on few replicas, and
    they win however long their queues), and that this can be detected and mitigated. The guard here is ours, as we know
    the paper's from its abstract alone: only replicas with at most ceil(hotspot * m / R) requests with this one are
    compared, m being all in flight with this one (as in `consistent_hash`); `hotspot` is 2 by default, `none` for no
    guard. New prefill tokens are this prompt's own, not those that wait there. Batch size counts waiting and running
    requests and this one itself, as an idle replica with no cache would otherwise beat every other; the last token of a
    prompt is always computed, so neither factor is ever 0. Ties go to fewer tokens, then to the lowest id.

    Requests are the larger of the router's own count and the reported one; hits are the replicas'. O(R + matches).
    """

    def __init__(self, hotspot: float | None = 2.0, block_size: int = 16) -> None:
        if hotspot is not None and hotspot < 1:
            raise ValueError(f"hotspot must be at least 1, or none, not {hotspot}")
        self._hotspot = hotspot
        self._block_size = block_size
        self._in_flight = InFlight()

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        loads = [self._in_flight.load(replica) for replica in replicas]
        bound = float("inf")
        if self._hotspot is not None:
            bound = self._hotspot * (sum(loads) + 1) / len(replicas)
        scores = []
        for replica, load in zip(replicas, loads, strict=True):
            if load < bound:  # load + 1 <= ceil(bound), in whole numbers
                tokens = num_uncached_tokens(request, replica.match(keys), self._block_size)
                scores.append((tokens * (load + 1), tokens, replica.id))
        chosen = min(scores)[2]
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)
