"""The books of the host memory tier: which of its blocks hold the KV of a swapped request, which hold that of a cached
prefix, by its key, and which are free.

A block holds what one KV block on the device holds, of all layers. Swapped requests have precedence: what they need is
taken from the cached blocks, those first that were used longest ago.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.block_pool import CachedBlock


@dataclass(slots=True, eq=False)
class HostBlock(CachedBlock):
    """A cached block of host memory; `hits` are those that have fetched it from there."""

    claims: int = 0  # of plans that are about to fetch it, until they have asked for the copy; while it goes to disk


class HostPool:
    """`num_blocks` blocks of host memory; 0 where there is no tier.

    Blocks may be given out again at once: copies are made in the order of the plans that ask for them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[bytes, HostBlock] = {}  # used longest ago first
        self._num_claimed = 0
        self._away: set[int] = set()  # neither free nor cached: what is on its way from disk, or to it and forgotten
        self.on_forget: Callable[[HostBlock, bool], None] | None = None  # told what goes, and whether for want of room

    @property
    def num_free(self) -> int:
        """Blocks that a swapped request can have: the free ones, and the cached ones."""
        return len(self._free) + len(self._cached) - self._num_claimed

    @property
    def num_unused(self) -> int:
        """Free blocks without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a cached prefix."""
        return len(self._cached)

    # Of swapped requests

    def allocate(self, count: int) -> list[int]:
        """`count` blocks; the caller has checked `num_free`. What was never torn apart comes in one run."""
        if not count:
            return []
        while len(self._free) < count:
            evicted = self._evict()
            assert evicted is not None, "more host blocks asked for than there are"
            self._free.append(evicted)
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(block_ids))

    # Of cached prefixes

    def __contains__(self, key: bytes) -> bool:
        return key in self._cached

    def get(self, key: bytes) -> HostBlock | None:
        """The cached block with this key, if there is one."""
        return self._cached.get(key)

    def keep(self, key: bytes, now: int, depth: int = 0, parent: bytes | None = None) -> int | None:
        """A block for the content with this key, which is not here yet; None where swapped requests hold them all."""
        block_id = self._take()
        if block_id is not None:
            self._cached[key] = HostBlock(block_id, key, depth, parent, references=0, last_used_ns=now)
        return block_id

    # On their way from disk

    def expect(self) -> int | None:
        """A block for content that is on its way, which nobody else gets; None where there is none."""
        block_id = self._take()
        if block_id is not None:
            self._away.add(block_id)
        return block_id

    def land(self, block_id: int, key: bytes, now: int, depth: int, parent: bytes | None) -> None:
        """What was expected is there, as content with this key, unless that has come another way."""
        self._away.remove(block_id)
        if key in self._cached:
            self._free.append(block_id)
        else:
            self._cached[key] = HostBlock(block_id, key, depth, parent, references=0, last_used_ns=now)

    def abandon(self, block_id: int) -> None:
        """What was expected does not come."""
        self._away.remove(block_id)
        self._free.append(block_id)

    def lookup(self, keys: Sequence[bytes], start: int) -> list[HostBlock]:
        """The longest run of cached blocks of the chain `keys` from `start` on. Changes nothing."""
        found = []
        for depth in range(start, len(keys)):
            block = self._cached.get(keys[depth])
            if block is None:
                break
            found.append(block)
        return found

    def claim(self, blocks: Sequence[HostBlock]) -> None:
        """Keep these from being evicted until `unclaim`."""
        for block in blocks:
            self._num_claimed += block.claims == 0
            block.claims += 1

    def unclaim(self, blocks: Sequence[HostBlock]) -> None:
        """The copies that were claimed for are asked for, or will not be made."""
        for block in blocks:
            block.claims -= 1
            if block.claims:
                continue
            if block.id in self._away:  # forgotten meanwhile
                self.abandon(block.id)
            else:
                self._num_claimed -= 1

    def touch(self, keys: Sequence[bytes], now: int) -> None:
        """These are used now: a chain's end is to go before its head."""
        for key in reversed(keys):
            block = self._cached.pop(key)
            block.last_used_ns = now
            self._cached[key] = block

    def expire(self, since: int) -> None:
        """Forget what was used last before this time."""
        while self._cached:
            block = next(iter(self._cached.values()))
            if block.last_used_ns >= since or block.claims:
                break
            self._free.append(self._forget(block, False))

    def flush(self) -> int:
        """Forget all cached content. Returns how many blocks that frees, some of them once they have been read."""
        count = len(self._cached)
        for block in list(self._cached.values()):
            block_id = self._forget(block, False)
            if block.claims:
                self._num_claimed -= 1
                self._away.add(block_id)
            else:
                self._free.append(block_id)
        return count

    def _take(self) -> int | None:
        return self._free.pop() if self._free else self._evict()

    def _evict(self) -> int | None:
        block = next((block for block in self._cached.values() if not block.claims), None)
        return None if block is None else self._forget(block, True)

    def _forget(self, block: HostBlock, for_room: bool) -> int:
        del self._cached[block.key]
        if self.on_forget is not None:
            self.on_forget(block, for_room)
        return block.id

    def check(self, held: Sequence[Sequence[int]], on_their_way: int = 0) -> None:
        """Raise AssertionError unless every block is free, cached, held or on its way, once. `held`: those of each
        swapped request; so many are on their way to disk or from it."""
        cached = [block.id for block in self._cached.values()]
        everywhere = [*self._free, *cached, *self._away, *(block for blocks in held for block in blocks)]
        assert sorted(everywhere) == list(range(self.num_blocks)), "host blocks are not conserved"
        assert self._num_claimed == sum(b.claims > 0 for b in self._cached.values()), "claims are counted wrongly"
        assert self._num_claimed + len(self._away) == on_their_way, "a host block is claimed by nobody's plan"
        used = [block.last_used_ns for block in self._cached.values()]
        assert used == sorted(used), "host blocks are not in the order of their last use"
