from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.offloading import Offloading
from policies.registry import register


@register("offload", "after_hits")
class AfterHits(Offloading):
    """Copy a prefix block to host memory once it has been hit a number of times.

    So that what is asked for only once takes up neither link nor memory; what has been hit less often is lost when the
    device evicts it. Hits are counted as long as the block is on the device.
    `hits` (1): so many; `ttl_s` (seconds, none): forget copies unused for so long; `fetch` (cheaper): `cheaper` or
    `always`; `ahead` (false): fetch for who waits for a slot or for tokens. O(1) a block.
    Source: the selective write-through of SGLang's HiCache.
    """

    def __init__(self, hits: int = 1, ttl_s: float | None = None, fetch: str = "cheaper", ahead: bool = False) -> None:
        super().__init__(ttl_s, fetch, ahead)
        if hits < 1:
            raise ValueError(f"hits must be at least 1, not {hits}")
        self._hits = hits

    def on_hit(self, block: CachedBlock, now: int) -> bool:
        return block.hits >= self._hits
