"""The paged KV cache's books: which blocks are free, held, or idle with content that may be hit again.

A block is in one of three places: on the free stack, held by one request or more, or idle (registered in the prefix
index, held by nobody, in the hands of the eviction policy). Only registered blocks can be shared, so only they need
a reference count. Keys are hash chains, so evicting a block in the middle of a chain is safe: what stood behind it
is not found until somebody computes the gap again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from policies.contract import Eviction
from policies.request import Request


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A registered block, as an eviction policy sees it."""

    id: int
    key: bytes
    depth: int  # index within its chain: 0 is a prompt's first block
    parent: bytes | None = None  # key of the block before it in its chain
    owner: Request | None = None  # who computed it, or hit it last
    references: int = 1
    hits: int = 0
    last_used_ns: int = 0


def num_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks so many tokens take."""
    return -(-num_tokens // block_size)


def num_idle(blocks: Iterable[CachedBlock]) -> int:
    """How many of them nobody holds: free until they are claimed."""
    return sum(block.references == 0 for block in blocks)


class BlockPool:
    """So many blocks, of a size that it need not know. With `eviction=None` nothing is cached."""

    def __init__(self, num_blocks: int, eviction: Eviction | None) -> None:
        self.num_blocks = num_blocks
        self.eviction = eviction
        self.num_idle = 0
        self.on_evict: Callable[[CachedBlock, int], None] | None = None  # told of what is to be given out anew
        self._free = list(range(num_blocks - 1, -1, -1))
        self._index: dict[bytes, CachedBlock] = {}
        self._registered: dict[int, CachedBlock] = {}

    @property
    def num_free(self) -> int:
        """Blocks that an allocation can have: the free ones and the idle ones."""
        return len(self._free) + self.num_idle

    @property
    def num_unused(self) -> int:
        """Free blocks without content."""
        return len(self._free)

    def allocate(self, count: int, now: int) -> list[int]:
        """`count` blocks, evicting idle ones when the free ones run out. The caller has checked `num_free`."""
        if count == 0:
            return []
        free = self._free
        if count > len(free):
            for _ in range(count - len(free)):
                free.append(self._evict(now))
        taken = free[-count:]
        del free[-count:]
        taken.reverse()
        return taken

    def allocate_one(self, now: int) -> int:
        """`allocate` of a single block."""
        return self._free.pop() if self._free else self._evict(now)

    def _evict(self, now: int) -> int:
        victim = self._forget_one(now)
        if self.on_evict is not None:
            self.on_evict(victim, now)
        return victim.id

    def _forget_one(self, now: int) -> CachedBlock:
        assert self.eviction is not None  # without a cache there is no idle block to need
        victim = self.eviction.pop_victim(now)
        del self._index[victim.key]
        del self._registered[victim.id]
        self.num_idle -= 1
        return victim

    def holds(self, block: CachedBlock) -> bool:
        """Whether this registered block is on the device still."""
        return self._registered.get(block.id) is block

    def lookup(self, keys: Sequence[bytes]) -> list[CachedBlock]:
        """The longest run of registered blocks at the head of the chain `keys`. Changes nothing."""
        found = []
        index = self._index
        for key in keys:
            block = index.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def claim(self, blocks: Sequence[CachedBlock], now: int, owner: Request | None = None) -> None:
        """Take a reference to each of these registered blocks: a prefix hit of `owner`."""
        assert self.eviction is not None
        for block in blocks:
            if block.references == 0:
                self.num_idle -= 1
            block.references += 1
            block.hits += 1
            block.owner = owner
            block.last_used_ns = now
            self.eviction.on_hit(block, now)

    def register(
        self,
        block_id: int,
        key: bytes,
        depth: int,
        now: int,
        parent: bytes | None = None,
        owner: Request | None = None,
    ) -> CachedBlock | None:
        """Enter a held, full block in the prefix index. None where the key has a block already."""
        if key in self._index:
            return None
        block = CachedBlock(block_id, key, depth, parent, owner, last_used_ns=now)
        self._index[key] = block
        self._registered[block_id] = block
        return block

    def release(self, block_ids: Sequence[int], now: int) -> None:
        """Give up one reference to each block, tail first, so that a chain's end is evicted before its head."""
        registered = self._registered
        if not registered:
            self._free.extend(reversed(block_ids))
            return
        for block_id in reversed(block_ids):
            block = registered.get(block_id)
            if block is None:
                self._free.append(block_id)
                continue
            block.references -= 1
            if block.references == 0:
                assert self.eviction is not None
                block.last_used_ns = now
                self.num_idle += 1
                self.eviction.on_idle(block, now)

    def num_freed_by(self, block_ids: Sequence[int], already: dict[int, int]) -> int:
        """How many blocks would become allocatable if these references were given up too.

        `already` counts references to registered blocks that the same plan gives up, less those that it takes; it
        is updated.
        """
        registered = self._registered
        if not registered:
            return len(block_ids)
        freed = 0
        for block_id in block_ids:
            block = registered.get(block_id)
            if block is not None:
                already[block_id] = already.get(block_id, 0) + 1
                if already[block_id] < block.references:
                    continue
            freed += 1
        return freed

    def flush(self) -> int:
        """Forget all idle content (a prefix-cache reset). Returns how many blocks that frees."""
        count = self.num_idle
        for _ in range(count):
            self._free.append(self._forget_one(0).id)
        return count

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is in exactly one place and every reference is counted.

        `held`: the block tables of all requests that hold any.
        """
        references = Counter(chain.from_iterable(held))
        idle = 0
        for block_id, block in self._registered.items():
            assert references.get(block_id, 0) == block.references, f"block {block_id}: wrong reference count"
            idle += block.references == 0
        assert idle == self.num_idle, "the count of idle blocks is wrong"
        if len(references) < sum(map(len, held)):
            shared = [b for b, count in references.items() if count > 1 and b not in self._registered]
            assert not shared, f"unregistered blocks held twice: {shared}"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free stack twice"
        assert free.isdisjoint(references), "a held block is on the free stack"
        total = len(self._free) + idle + len(references)
        assert total == self.num_blocks, f"blocks not conserved: {total} of {self.num_blocks}"
