from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import Rank, RankedEviction
from policies.registry import register
from policies.use_counts import UseCounts


@register("eviction", "lfu")
class Lfu(RankedEviction):
    """Evict the block with the fewest hits; among those, the one that has been idle longest.

    SGLang's `lfu` (hits, then time of the last use), which forgets a block's hits with the block (in-cache LFU).
    `remember=true` goes on counting where it was before the block was evicted (perfect LFU), at the price of a number
    for every key ever evicted; in a small cache, where little stays long enough to be hit twice, that is worth much.

    Counts never fade: what was popular once stays, which is why LFU does badly in a large cache (`gdsf` lets counts
    fade). Whoever hits a block hits all before it in its chain, so ends of chains go first by themselves. O(log n).
    """

    def __init__(self, remember: bool = False) -> None:
        super().__init__()
        self._uses = UseCounts(remember)

    def rank(self, block: CachedBlock, now: int) -> Rank:
        return self._uses.hits(block)

    def on_evict(self, block: CachedBlock, rank: Rank) -> None:
        self._uses.on_evict(block)
