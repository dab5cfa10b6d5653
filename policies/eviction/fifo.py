from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import Rank, RankedEviction
from policies.registry import register


@register("eviction", "fifo")
class Fifo(RankedEviction):
    """Evict the block that became idle for the first time longest ago, however often it was hit since.

    The age counts from when the request that computed the block let go of it, not from when it was computed (SGLang's
    `fifo` takes a node's creation): only then does an eviction policy hear of it, and a request's blocks are computed
    at about the same time. Blocks of one request go tail first.

    By age alone the shared head of many chains would go before their tails, which nobody could then find; as in SGLang,
    only ends of chains go. Unlike LRU, FIFO may hit less with more memory (Belady's anomaly). O(log n).
    """

    def __init__(self) -> None:
        super().__init__()
        self._first_idle: dict[bytes, int] = {}
        self._seen = 0

    def rank(self, block: CachedBlock, now: int) -> Rank:
        self._seen += 1
        return self._first_idle.setdefault(block.key, self._seen)

    def on_evict(self, block: CachedBlock, rank: Rank) -> None:
        del self._first_idle[block.key]
