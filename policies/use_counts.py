"""How often a cached block was used again."""

from __future__ import annotations

from policies.block_pool import CachedBlock


class UseCounts:
    """Hits of blocks: since they were computed, or (`remember`) ever.

    To remember costs a number for each key that was ever evicted. The first use, which computes a block, counts as one
    only in what is remembered: a block that was computed, evicted and computed again was used again.
    """

    def __init__(self, remember: bool) -> None:
        self._remember = remember
        self._before: dict[bytes, int] = {}

    def hits(self, block: CachedBlock) -> int:
        return block.hits + self._before.get(block.key, 0)

    def on_evict(self, block: CachedBlock) -> None:
        if self._remember:
            self._before[block.key] = self.hits(block) + 1
