from __future__ import annotations

from dataclasses import dataclass

from policies.block_pool import CachedBlock
from policies.idle_blocks import IdleBlocks
from policies.registry import register

SMALL, MAIN = 0, 1
MOST_HITS = 3  # two bits


@dataclass(slots=True)
class _Place:
    queue: int
    position: int
    hits: int


@register("eviction", "s3_fifo")
class S3Fifo:
    """S3-FIFO: new blocks pass a small queue first, where those that are not hit again are sorted out quickly.

    Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1. New
    blocks enter a small FIFO queue, those whose key is remembered as a ghost the main one. While the small queue
    holds its share of the cache or more (`small`, 0.1) the victim is sought at its tail: a block hit more than once
    since it came moves to the main queue, with its hits forgotten; another one goes, and its key is a ghost's. Else
    it is sought at the main queue's tail: a block with hits left goes round once more with one less; another one
    goes. Hits count to three. There are at most as many ghosts as the main queue's share has blocks.

    The authors' later code lets new blocks enter the main queue while the small one is full and the cache is not; the
    paper, and so we, the small one.

    A block keeps its place in its queue while it is in use, and the size of the cache is the number of blocks in both
    queues; the tail of a queue is its oldest block that is idle and the end of a chain, and where a queue has none,
    the victim is sought in the other. O(log n) amortised (the paper's queues are O(1), but have no chains and nothing
    in use).
    """

    def __init__(self, small: float = 0.1) -> None:
        if not 0 < small < 1:
            raise ValueError(f"small must be above 0 and below 1, not {small}")
        self._small = small
        self._idle = IdleBlocks(segments=2)
        self._places: dict[bytes, _Place] = {}
        self._sizes = [0, 0]
        self._ghosts: dict[bytes, None] = {}  # oldest first
        self._entered = 0

    def on_idle(self, block: CachedBlock, now: int) -> None:
        place = self._places.get(block.key)
        if place is None:
            queue = MAIN if block.key in self._ghosts else SMALL
            self._ghosts.pop(block.key, None)
            place = self._enter(block, queue, min(block.hits, MOST_HITS))
        self._idle.add(block, place.position, place.queue)

    def on_hit(self, block: CachedBlock, now: int) -> None:
        self._idle.discard(block)
        place = self._places.get(block.key)
        if place is not None:
            place.hits = min(place.hits + 1, MOST_HITS)

    def pop_victim(self, now: int) -> CachedBlock:
        while True:
            queue, block = self._tail()
            place = self._leave(block)
            if queue == SMALL and place.hits > 1:
                place = self._enter(block, MAIN, 0)
            elif queue == MAIN and place.hits > 0:
                place = self._enter(block, MAIN, place.hits - 1)
            else:
                if queue == SMALL:
                    self._remember(block.key)
                return block
            self._idle.add(block, place.position, place.queue)

    def _tail(self) -> tuple[int, CachedBlock]:
        first = SMALL if self._sizes[SMALL] >= self._small * sum(self._sizes) else MAIN
        for queue in (first, 1 - first):
            oldest = self._idle.pop(queue)  # with its position, the rank here
            if oldest is not None:
                return queue, oldest[1]
        raise AssertionError("asked for a victim where no block is idle")

    def _enter(self, block: CachedBlock, queue: int, hits: int) -> _Place:
        self._entered += 1
        place = self._places[block.key] = _Place(queue, self._entered, hits)
        self._sizes[queue] += 1
        return place

    def _leave(self, block: CachedBlock) -> _Place:
        place = self._places.pop(block.key)
        self._sizes[place.queue] -= 1
        return place

    def _remember(self, key: bytes) -> None:
        self._ghosts[key] = None
        most = (1 - self._small) * (sum(self._sizes) + 1)  # with the one that goes, as the cache is full
        while len(self._ghosts) > most:
            del self._ghosts[next(iter(self._ghosts))]
