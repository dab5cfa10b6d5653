"""The idle blocks of an eviction policy that goes by a rank, in which only the ends of chains can be taken.

Keys are hash chains, so a block whose parent is gone cannot be found any more, though it still takes up memory. A rank
that never puts a parent before its child needs no help against that: LRU's does not, as blocks become idle tail first,
nor does one that counts hits, as whoever hits a child hits its parent. A rank by first use, depth or cost may. So a
block is offered only while none of its children is idle, as SGLang offers only the leaves of its tree.

A child that is *held* does not keep its parent: both were held together, unless two requests computed the same prefix
at the same time, and then the parent must be evictable, since there may be nothing else to evict.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

from policies.block_pool import CachedBlock

Rank = float | tuple[float, ...]
Entry = tuple[Rank, int, CachedBlock]


class IdleBlocks:
    """Idle blocks in one segment or more, each in order of rank; ties: whichever has been idle longest.

    Everything is O(log n) amortised, and O(1) for a block with an idle child, which most are.
    `leaves_only` may be set to False while nothing is idle, to see what it is worth: any block may be taken then.
    """

    def __init__(self, segments: int = 1) -> None:
        self.leaves_only = True
        self._heaps: list[list[Entry]] = [[] for _ in range(segments)]
        self._places: dict[bytes, tuple[Entry, int]] = {}  # by key: the entry and its segment
        self._children: dict[bytes, int] = {}  # key -> how many children of the block with this key are idle
        self._sizes = [0] * segments
        self._added = 0

    def __len__(self) -> int:
        return len(self._places)

    def size(self, segment: int) -> int:
        return self._sizes[segment]

    def find(self, key: bytes) -> tuple[Rank, CachedBlock] | None:
        """The idle block with this key, with its rank, or None."""
        place = self._places.get(key)
        return None if place is None else (place[0][0], place[0][2])

    def add(self, block: CachedBlock, rank: Rank = 0, segment: int = 0) -> None:
        """The block is idle from now on."""
        self._added += 1
        entry = (rank, self._added, block)
        self._places[block.key] = (entry, segment)
        self._sizes[segment] += 1
        if block.parent is not None:
            self._children[block.parent] = self._children.get(block.parent, 0) + 1
        if self._may_go(block.key):
            self._offer(entry, segment)

    def discard(self, block: CachedBlock) -> bool:
        """The block is not idle any more. False if it was not."""
        place = self._places.pop(block.key, None)
        if place is None:
            return False
        self._sizes[place[1]] -= 1
        parent = block.parent
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                above = self._places.get(parent)
                if above is not None and self.leaves_only:
                    self._offer(*above)
        return True

    def pop(self, segment: int = 0) -> tuple[Rank, CachedBlock] | None:
        """Take the first block of the segment, with its rank. None where it has none that is the end of a chain."""
        heap = self._heaps[segment]
        while heap:
            entry = heapq.heappop(heap)
            rank, _, block = entry
            place = self._places.get(block.key)
            if place is not None and place[0] is entry and self._may_go(block.key):
                self.discard(block)
                return rank, block
        return None

    def _may_go(self, key: bytes) -> bool:
        return not self.leaves_only or key not in self._children

    def _offer(self, entry: Entry, segment: int) -> None:
        heap = self._heaps[segment]
        heapq.heappush(heap, entry)
        if len(heap) > 2 * len(self._places) + 64:  # most are of blocks that somebody has hit since
            heap[:] = [e for e, s in self._places.values() if s == segment and self._may_go(e[2].key)]
            heapq.heapify(heap)


class RankedEviction(ABC):
    """Evict the end of a chain with the smallest rank; the rank is taken when a block becomes idle."""

    def __init__(self) -> None:
        self._idle = IdleBlocks()

    @abstractmethod
    def rank(self, block: CachedBlock, now: int) -> Rank:
        """The block's place among the idle ones, a number or (for all) a tuple; lower goes first."""

    def on_idle(self, block: CachedBlock, now: int) -> None:
        self._idle.add(block, self.rank(block, now))

    def on_hit(self, block: CachedBlock, now: int) -> None:
        self._idle.discard(block)

    def pop_victim(self, now: int) -> CachedBlock:
        popped = self._idle.pop()
        assert popped is not None, "asked for a victim where no block is idle"
        rank, block = popped
        self.on_evict(block, rank)
        return block

    def on_evict(self, block: CachedBlock, rank: Rank) -> None:  # noqa: B027  (most need nothing)
        """It goes, with this rank."""
