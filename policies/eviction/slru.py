from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import Rank, RankedEviction
from policies.registry import register


@register("eviction", "slru")
class Slru(RankedEviction):
    """Segmented LRU: blocks that were hit less than twice go first, each kind longest idle first.

    SGLang's `slru`. `protected_hits` (2): so many hits make a block protected. In the paper (Karedla, Love, Wherry,
    "Caching strategies to improve disk system performance", Computer 27(3), 1994) one hit does, and the protected
    segment has a size: its least recently used block falls back among the others when it is full. SGLang's has none
    and nothing falls back, and so here: once everything idle is protected, this is LRU. `protected_hits` above all
    counts: LRU. O(log n).
    """

    def __init__(self, protected_hits: int = 2) -> None:
        super().__init__()
        if protected_hits < 1:
            raise ValueError(f"protected_hits must be at least 1, not {protected_hits}")
        self._protected_hits = protected_hits

    def rank(self, block: CachedBlock, now: int) -> Rank:
        return block.hits >= self._protected_hits
