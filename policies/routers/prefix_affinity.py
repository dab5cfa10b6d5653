from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight, RoutedPrefixes


@register("router", "prefix_affinity")
class PrefixAffinity:
    """Where the longest part of the prompt was sent before, as long as no replica has far more requests than another.

    SGLang's router ("cache-aware", sgl-router, v0.4, December 2024), with its defaults:

        max - min > balance_abs (32) and max > balance_rel (1.1) * min, in requests  ->  the fewest requests
        matched / prompt > threshold (0.5)                                           ->  the replica that matches
        else                                                                         ->  the smallest tree

    The trees are the router's own: what it has sent where, not what the replicas report; whatever the case, the prompt
    enters the chosen one's. Ties go to fewer requests, then to the lowest id.

    Departures: matches are counted in whole blocks (theirs in characters), so a prompt shorter than a block has nothing
    to match and goes to the fewest requests. A tree has at most as many blocks as its replica; the least recently used
    go at once, ends of prompts first (theirs is cut to a set size every 30 s). Of several replicas that match equally
    the one with the fewest requests is taken (theirs: the last used). A replica that takes no requests loses its tree.
    O(R + log blocks) for the choice, O(blocks of the prompt) to note it.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        balance_abs: int = 32,
        balance_rel: float = 1.1,
        block_size: int = 16,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, not {threshold}")
        if balance_abs < 0 or balance_rel < 1:
            raise ValueError(f"balance_abs must be at least 0 and balance_rel 1, not {balance_abs} and {balance_rel}")
        self._threshold = threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel
        self._block_size = block_size
        self._trees = RoutedPrefixes()
        self._in_flight = InFlight()

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        loads = {replica.id: self._in_flight.load(replica) for replica in replicas}
        self._trees.keep_only(loads)
        chosen = self._choose(request, keys, loads)
        num_blocks = next(replica.num_blocks for replica in replicas if replica.id == chosen)
        self._trees.sent(keys, chosen, num_blocks)
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)

    def _choose(self, request: Request, keys: Sequence[bytes], loads: dict[int, int]) -> int:
        least, most = min(loads.values()), max(loads.values())
        if not keys or (most - least > self._balance_abs and most > self._balance_rel * least):
            return min(loads, key=lambda i: (loads[i], i))
        matched, replicas = self._trees.best_match(keys)
        if matched * self._block_size > self._threshold * request.num_prompt_tokens:
            return min(replicas, key=lambda i: (loads[i], i))
        return min(loads, key=lambda i: (self._trees.size(i), loads[i], i))
