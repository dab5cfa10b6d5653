from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import IdleBlocks
from policies.registry import register

ONCE, AGAIN = 0, 1  # T1 with its ghosts B1, T2 with its ghosts B2


@register("eviction", "arc")
class Arc:
    """Adaptive Replacement Cache: a list of blocks used once and one of blocks used again, whose shares adapt.

    Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. T1 holds what was used once, T2
    what was used again, each longest idle first; B1 and B2 remember the keys of what was evicted from them. A key that
    comes back although it is in B1 says that T1 was too small, and its target p grows by max(1, |B2| / |B1|); one in B2
    says the opposite, and p shrinks by max(1, |B1| / |B2|). The victim is from T1 while |T1| > p, else from T2.

    The cache is what is idle: blocks in use are in no list, as they cannot go, and its size c, which bounds
    |T1| + |B1| by c and all four together by 2c, is the most blocks that were ever idle at once. What differs:

    - In the paper a miss looks into the ghost lists before it makes room; here room is made before anybody knows which
      block will stand there, so that p moves after the eviction, and the paper's case of a key in B2 with |T1| = p,
      which takes from T1, is left out.
    - vLLM's CPU offload (`v1/kv_offload/cpu/policies/arc.py`) looks into the ghost lists before it makes room, but
      enters a block that comes back in T1, takes from T1 while |T1| >= p, and lets each ghost list have c keys; the
      paper, and so we, enter it in T2, take from T1 while |T1| > p, and bound the lists as above.
    - Only ends of chains go; where a list has none, the victim is from the other.

    O(log n), for the ends of chains; keys of evicted blocks: at most twice as many as idle blocks.
    """

    def __init__(self) -> None:
        self._idle = IdleBlocks(segments=2)
        self._ghosts: tuple[dict[bytes, None], dict[bytes, None]] = ({}, {})  # oldest first
        self._target = 0.0
        self._most_idle = 0
        self._came_back: dict[bytes, None] = {}  # those in the pool whose key was a ghost's

    def on_idle(self, block: CachedBlock, now: int) -> None:
        self._look_for_ghost(block.key)
        self._idle.add(block, segment=AGAIN if block.hits or block.key in self._came_back else ONCE)
        self._most_idle = max(self._most_idle, len(self._idle))
        self._forget_ghosts()

    def on_hit(self, block: CachedBlock, now: int) -> None:
        self._idle.discard(block)

    def pop_victim(self, now: int) -> CachedBlock:
        first = ONCE if self._idle.size(ONCE) > self._target else AGAIN
        for segment in (first, 1 - first):
            popped = self._idle.pop(segment)
            if popped is not None:
                block = popped[1]
                self._ghosts[segment][block.key] = None
                self._came_back.pop(block.key, None)
                return block
        raise AssertionError("asked for a victim where no block is idle")

    def _look_for_ghost(self, key: bytes) -> None:
        once, again = self._ghosts
        if key in once:
            self._target = min(self._most_idle, self._target + max(1.0, len(again) / len(once)))
            del once[key]
        elif key in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[key]
        else:
            return
        self._came_back[key] = None

    def _forget_ghosts(self) -> None:
        once, again = self._ghosts
        while once and self._idle.size(ONCE) + len(once) > self._most_idle:
            del once[next(iter(once))]
        while again and len(self._idle) + len(once) + len(again) > 2 * self._most_idle:
            del again[next(iter(again))]
