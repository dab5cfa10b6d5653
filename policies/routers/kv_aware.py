from __future__ import annotations

import math
from collections.abc import Sequence

from policies.block_pool import num_blocks
from policies.contract import Replica, Route
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request
from policies.routing import num_leading, num_uncached_tokens


@register("router", "kv_aware")
class KvAware:
    """The least prefill work after prefix hits plus memory in use, both in KV blocks, as NVIDIA Dynamo's router does.

        cost = weight * (prompt tokens still to compute there + this prompt's beyond its hit) / block size
             + blocks of all requests there, this one's included

    The smallest cost wins (ties to the lowest id), or with `temperature` T > 0 a draw keyed by the request, with
    probabilities proportional to exp(-(cost - least) / (most - least) / T). `weight`: 1; more for time to first token,
    less for time between tokens. Source: Dynamo's documentation, "KV cache routing" and "Router design" (v0.7), whose
    example (prefill and decode blocks 8, 10; 5, 5; 2, 9) costs 18, 10 and 11.

    Dynamo's router counts by itself and hears of first tokens; a router here does not. So tokens still to compute are
    `Replica.num_prefill_tokens` (whole prompts while they wait, without their hits). Blocks in use are the router's
    own count of the prompts in flight, shared blocks once, or what the replica reports (`num_blocks` less
    `num_free_blocks`, which has generated tokens, but no waiting prompts), whichever is more.

    O(R * log blocks + matches) for the choice, O(blocks of the prompt) to note it. Memory: prompts in flight.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 0.0, block_size: int = 16, seed: int = 0) -> None:
        if weight < 0 or temperature < 0:
            raise ValueError(f"weight and temperature must be at least 0, not {weight} and {temperature}")
        self._weight = weight
        self._temperature = temperature
        self._block_size = block_size
        self._stream = RandomStream(seed, "kv_aware")
        self._active: dict[int, ActiveBlocks] = {}  # by replica
        self._sent: dict[int, tuple[int, Sequence[bytes], int]] = {}  # request id -> replica, keys, blocks without key

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        costs = [self.replica_cost(request, keys, replica) for replica in replicas]
        chosen = self._choose(request, costs, [replica.id for replica in replicas])
        self.on_end(request, chosen, now)  # should it be routed anew without having ended
        self._sent[request.id] = (chosen, keys, max(0, self._num_blocks(request) - len(keys)))
        self._active.setdefault(chosen, ActiveBlocks()).add(*self._sent[request.id][1:])
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        if request.id in self._sent:
            sent_to, keys, others = self._sent.pop(request.id)
            self._active[sent_to].remove(keys, others)
            if not self._active[sent_to].count:
                del self._active[sent_to]

    def replica_cost(self, request: Request, keys: Sequence[bytes], replica: Replica) -> float:
        """What this request costs at a replica."""
        to_compute = replica.num_prefill_tokens + num_uncached_tokens(request, replica.match(keys), self._block_size)
        active = self._active.get(replica.id, NOTHING)
        in_use = max(active.count, replica.num_blocks - replica.num_free_blocks)
        new = self._num_blocks(request) - num_leading(keys, active.holders)
        return self.cost(to_compute / self._block_size, in_use + new)

    def cost(self, prefill_blocks: float, decode_blocks: float) -> float:
        return self._weight * prefill_blocks + decode_blocks

    def _num_blocks(self, request: Request) -> int:
        return num_blocks(request.num_prompt_tokens, self._block_size)

    def _choose(self, request: Request, costs: list[float], ids: list[int]) -> int:
        least, spread = min(costs), max(costs) - min(costs)
        if self._temperature == 0:
            return min(i for i, cost in zip(ids, costs, strict=True) if cost == least)
        scale = self._temperature * spread or 1.0
        shares = [math.exp(-(cost - least) / scale) for cost in costs]
        left = self._stream.uniform(request.id) * sum(shares)
        for i, share in zip(ids, shares, strict=True):
            left -= share
            if left < 0:
                return i
        return ids[-1]  # rounding has left a little


class ActiveBlocks:
    """The blocks of the prompts in flight at one replica; one that several of them share counts once."""

    def __init__(self) -> None:
        self.holders: dict[bytes, int] = {}
        self._others = 0

    @property
    def count(self) -> int:
        return len(self.holders) + self._others

    def add(self, keys: Sequence[bytes], others: int) -> None:
        self._others += others
        for key in keys:
            self.holders[key] = self.holders.get(key, 0) + 1

    def remove(self, keys: Sequence[bytes], others: int) -> None:
        self._others -= others
        for key in keys:
            left = self.holders.pop(key) - 1
            if left:
                self.holders[key] = left


NOTHING = ActiveBlocks()
