from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.offloading import Offloading
from policies.registry import register


@register("offload", "write_back")
class WriteBack(Offloading):
    """Copy a prefix block to host memory when the device evicts it.

    What is on the host is what the device has no room for, so that the two tiers together hold most; each eviction
    costs a copy, in the step that needs the block.
    `ttl_s` (seconds, none): forget copies unused for so long; `fetch` (cheaper): `cheaper` or `always`;
    `ahead` (false): fetch for who waits for a slot or for tokens. O(1) a block.
    Source: the write-back policy of SGLang's HiCache; Gao et al., "CachedAttention", USENIX ATC 2024.
    """

    def on_evict(self, block: CachedBlock, now: int) -> bool:
        return True
