from __future__ import annotations

from collections import OrderedDict

from policies.block_pool import CachedBlock
from policies.registry import register


@register("eviction", "lru")
class Lru:
    """Evict the block that has been idle longest. O(1) each.

    A request's blocks become idle tail first, so the end of a chain goes before its head (vLLM's block pool).
    """

    def __init__(self) -> None:
        self._idle: OrderedDict[int, CachedBlock] = OrderedDict()

    def on_idle(self, block: CachedBlock, now: int) -> None:
        self._idle[block.id] = block

    def on_hit(self, block: CachedBlock, now: int) -> None:
        self._idle.pop(block.id, None)

    def pop_victim(self, now: int) -> CachedBlock:
        return self._idle.popitem(last=False)[1]
