from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.offloading import Offloading
from policies.registry import register


@register("offload", "write_through")
class WriteThrough(Offloading):
    """Copy every prefix block to host memory as soon as it is full.

    The copy is made with the next step, when nobody waits for it, and an eviction costs nothing. What is on the device
    is on the host too, as far as that has room; blocks that nobody will ever hit are copied as well.
    `ttl_s` (seconds, none): forget copies unused for so long; `fetch` (cheaper): `cheaper` or `always`;
    `ahead` (false): fetch for who waits for a slot or for tokens. O(1) a block.
    Source: the write-through policy of SGLang's HiCache.
    """

    def on_fill(self, block: CachedBlock, now: int) -> bool:
        return True
