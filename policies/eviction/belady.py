from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from policies.block_pool import CachedBlock
from policies.idle_blocks import IdleBlocks
from policies.registry import register
from policies.request import Request


@register("eviction", "belady")
class Belady:
    """Belady's MIN: evict the block whose next use is farthest in the future. Clairvoyant: it is told all requests.

    Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966. No
    policy that must take in every block it is given has more hits, where blocks are used one at a time and each for
    itself (Mattson and others, 1970). Here whole chains are used and a hit ends at the first gap, and blocks in use
    cannot go; it is a very good bound then, not a proven one.

    `future` has the chain of block keys of every request, by id, in the order in which they arrive. Time is counted
    in requests: it is the last of them that was seen to use a cached block, so what is before it counts as past.
    Under FCFS that is exact but for requests that wait again after a preemption; a policy that lets requests overtake
    makes the next use of a block a guess for those that were overtaken. Where nobody knows the future (a server, a
    run on a GPU whose outputs are yet to be sampled) it is refused. O(log n) amortised; memory: all keys to come.
    """

    clairvoyant = True

    def __init__(self, future: Mapping[int, Sequence[bytes]] | None = None) -> None:
        if future is None:
            raise ValueError("belady needs the block keys of all requests beforehand; only a simulation knows them")
        self._turn = {request_id: turn for turn, request_id in enumerate(future)}
        self._uses: dict[bytes, list[int]] = {}
        for turn, chain in enumerate(future.values()):
            for key in chain:
                self._uses.setdefault(key, []).append(turn)
        self._clock = -1
        self._idle = IdleBlocks()
        self._due: list[tuple[float, bytes]] = []  # keys of idle blocks by next use, to notice when it is past

    def on_idle(self, block: CachedBlock, now: int) -> None:
        self._advance(block.owner)
        self._add(block)

    def on_hit(self, block: CachedBlock, now: int) -> None:
        self._idle.discard(block)
        self._advance(block.owner)

    def pop_victim(self, now: int) -> CachedBlock:
        popped = self._idle.pop()
        assert popped is not None, "asked for a victim where no block is idle"
        return popped[1]

    def _add(self, block: CachedBlock) -> None:
        uses = self._uses.get(block.key, [])
        after = bisect_right(uses, self._clock)
        next_use = uses[after] if after < len(uses) else math.inf
        self._idle.add(block, -next_use)
        if next_use != math.inf:
            heapq.heappush(self._due, (next_use, block.key))

    def _advance(self, user: Request | None) -> None:
        """This request uses a block now: those it was to use and did not reach will be used later, if at all."""
        turn = -1 if user is None else self._turn.get(user.id, -1)
        if turn <= self._clock:
            return
        self._clock = turn
        while self._due and self._due[0][0] <= turn:
            next_use, key = heapq.heappop(self._due)
            found = self._idle.find(key)
            if found is not None and found[0] == -next_use:
                self._idle.discard(found[1])
                self._add(found[1])
