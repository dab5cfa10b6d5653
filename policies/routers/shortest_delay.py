from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.costing import decode_ns
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight


@register("router", "shortest_delay")
class ShortestDelay:
    """The replica with the shortest expected delay: requests there, this one included, over how fast it is.

    Shortest expected delay (SED) for servers of different speeds, as analysed by Banawan and Zahorjan, "Load sharing in
    heterogeneous queueing systems", INFOCOM 1989: join the queue with the least (n + 1) / mu. For mu, tokens a second
    in a full decode step of the replica's own cost model (`Replica.cost`): `max_num_seqs` sequences, or as many as its
    memory holds, that together fill half of it (`tokens_per_seq`, 1024, is what one is taken to need). Replicas without
    a cost model, as in the runtime, are taken to be equally fast, among such it is `least_requests`. Ties go to the
    lowest id.

    `load`: as `least_requests` has it. O(R); memory: what is in flight, and a number for each pool.
    """

    def __init__(self, load: str = "both", tokens_per_seq: int = 1024, block_size: int = 16) -> None:
        if tokens_per_seq < 1:
            raise ValueError(f"tokens_per_seq must be at least 1, not {tokens_per_seq}")
        self._in_flight = InFlight(load)
        self._tokens_per_seq = tokens_per_seq
        self._block_size = block_size
        self._ns_per_token: dict[tuple[str, int, int], float] = {}

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        in_flight = self._in_flight
        chosen = min(replicas, key=lambda r: ((in_flight.load(r) + 1) * self.ns_per_token(r), r.id)).id
        in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)

    def ns_per_token(self, replica: Replica) -> float:
        """1 / mu."""
        cost = replica.cost
        if cost is None:
            return 1.0
        key = replica.pool, replica.num_blocks, replica.max_num_seqs
        known = self._ns_per_token.get(key)
        if known is None:
            memory = replica.num_blocks * self._block_size
            batch = max(1, min(replica.max_num_seqs, memory // self._tokens_per_seq))
            known = self._ns_per_token[key] = decode_ns(cost, batch, memory // 2) / batch
        return known
