from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.contract import CostModel, PoolRole, Replica, Route, Router
from policies.registry import find, make_inner, moves_kv, register
from policies.request import Request


@dataclass(frozen=True, slots=True)
class Reading:
    """A replica's figures as they were at one time. Its cached blocks are looked up as they are."""

    replica: Replica
    id: int
    num_waiting: int
    num_running: int
    num_prefill_tokens: int
    num_outstanding_tokens: int
    num_blocks: int
    num_free_blocks: int
    pool: str
    role: PoolRole
    cost: CostModel | None
    max_num_seqs: int

    @classmethod
    def of(cls, replica: Replica) -> Reading:
        return cls(
            replica,
            replica.id,
            replica.num_waiting,
            replica.num_running,
            replica.num_prefill_tokens,
            replica.num_outstanding_tokens,
            replica.num_blocks,
            replica.num_free_blocks,
            replica.pool,
            replica.role,
            replica.cost,
            replica.max_num_seqs,
        )

    def match(self, keys: Sequence[bytes]) -> int:
        return self.replica.match(keys)


@register("router", "stale")
class Stale:
    """Another router, which sees every replica's figures as they were up to `refresh_ms` milliseconds ago.

    The first request after so long has them read anew, as from a load report that comes now and then. Between two of
    them everybody is sent to whoever looked idle (Mitzenmacher, "How Useful Is Old Information?", IEEE TPDS 2000).
    Unless they count by themselves what they send: `least_requests` does, if not told `load=reported`.

    `router`: the other router, with its knobs behind slashes: `stale,router=power_of_two/load=reported,refresh_ms=50`.
    `refresh_ms`: 100 by default; 0 is never old. O(R) beside the other router's own cost.
    """

    def __init__(
        self, router: str = "least_tokens", refresh_ms: float = 100.0, seed: int = 0, block_size: int = 16
    ) -> None:
        if refresh_ms < 0:
            raise ValueError(f"refresh_ms must be at least 0, not {refresh_ms}")
        if moves_kv(find("router", router.split("/")[0])):
            raise ValueError(f"{router} moves KV between replicas, and would miss what they say meanwhile; not in here")
        self._router: Router = make_inner("router", router, seed=seed, block_size=block_size)
        self._refresh_ns = round(1e6 * refresh_ms)
        self._read_at = 0
        self._readings: dict[int, Reading] = {}

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        if now - self._read_at >= self._refresh_ns:
            self._readings.clear()
            self._read_at = now
        for replica in replicas:
            known = self._readings.get(replica.id)
            if known is None or known.replica is not replica:  # a new one, or a new one in an old one's place
                self._readings[replica.id] = Reading.of(replica)
        return self._router.route(request, keys, [self._readings[replica.id] for replica in replicas], now)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._router.on_end(request, replica, now)
