"""The books of the disk tier: which of its blocks hold which cached prefix, by its key, and which are free.

A disk block is a place for what one host block holds. Nothing is deleted: a place is given out again once nothing is
on its way to it or from it, and then written over.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class DiskBlock:
    """A cached block on disk, or on its way there."""

    id: int
    key: bytes
    depth: int
    parent: bytes | None
    last_used_ns: int
    busy: bool = True
    """Whether it is being written or read."""
    written: bool = False


class DiskPool:
    """`num_blocks` places, those of cached blocks in the order of their last use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[bytes, DiskBlock] = {}  # used longest ago first
        self._forgotten: dict[int, DiskBlock] = {}  # while they were busy: free as soon as they are not

    @property
    def num_cached(self) -> int:
        """Blocks that hold a cached prefix, or will."""
        return len(self._cached)

    def get(self, key: bytes) -> DiskBlock | None:
        """The block with this key, if there is one."""
        return self._cached.get(key)

    def keep(self, key: bytes, now: int, depth: int, parent: bytes | None) -> DiskBlock | None:
        """A place, busy, for content that is not here yet; None where everything is being written or read."""
        if not self._free:
            oldest = next((block for block in self._cached.values() if not block.busy), None)
            if oldest is None:
                return None
            self.drop(oldest)
        block = self._cached[key] = DiskBlock(self._free.pop(), key, depth, parent, now)
        return block

    def touch(self, block: DiskBlock, now: int) -> None:
        """It is used now."""
        block.last_used_ns = now
        self._cached[block.key] = self._cached.pop(block.key)

    def settle(self, block: DiskBlock) -> bool:
        """Nothing is on its way to it or from it any more. Whether its content still counts."""
        block.busy = False
        if self._forgotten.pop(block.id, None) is None:
            return True
        self._free.append(block.id)
        return False

    def drop(self, block: DiskBlock) -> None:
        """Forget its content."""
        del self._cached[block.key]
        if block.busy:
            self._forgotten[block.id] = block
        else:
            self._free.append(block.id)

    def expire(self, since: int) -> None:
        """Forget what was used last before this time."""
        while self._cached:
            block = next(iter(self._cached.values()))
            if block.last_used_ns >= since:
                break
            self.drop(block)

    def flush(self) -> int:
        """Forget everything. Returns how many blocks that were."""
        count = len(self._cached)
        for block in list(self._cached.values()):
            self.drop(block)
        return count

    def check(self, on_their_way: int) -> None:
        """Raise AssertionError unless every place is free, cached, or forgotten and busy, once."""
        everywhere = [*self._free, *(block.id for block in self._cached.values()), *self._forgotten]
        assert sorted(everywhere) == list(range(self.num_blocks)), "disk blocks are not conserved"
        busy = sum(block.busy for block in self._cached.values()) + len(self._forgotten)
        assert busy == on_their_way, "a disk block is busy for nobody"
        used = [block.last_used_ns for block in self._cached.values()]
        assert used == sorted(used), "disk blocks are not in the order of their last use"
