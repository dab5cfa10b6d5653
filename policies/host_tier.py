"""Cached prefixes in host memory: what is copied there as the stack's offload policy says, and fetched for a hit.

The copies are those of a step (`Step.copies`), made in the order in which the books change: after all that earlier
steps compute and before anything that this one does. So a block may be given out again as soon as the copy of its
content is asked for, and a fetched block is as good as computed in the step that admits who hits it. A block that a
step in flight fills is copied with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from policies.block_pool import CachedBlock, num_idle
from policies.contract import Hit, Offload
from policies.host_pool import HostBlock
from policies.plan import BlockCopy
from policies.request import Request

if TYPE_CHECKING:
    from policies.replica_state import ReplicaState


class HostTier:
    """The host's part in a replica's prefix cache. Its books are the host pool's."""

    def __init__(self, state: ReplicaState) -> None:
        self._state = state
        self._due: dict[int, CachedBlock] = {}  # to be copied with the next step, if they are on the device still

    @property
    def policy(self) -> Offload:
        return self._state.stack.offload

    @property
    def keeps_nothing(self) -> bool:
        return bool(getattr(self.policy, "keeps_nothing", False))

    def begin(self, now: int) -> None:
        """A plan is about to be made."""
        host = self._state.host
        since = self.policy.keeps_since(now)
        if since is not None:
            host.expire(since)
        if self._due:
            due, self._due = self._due, {}
            for block in due.values():
                if self._state.pool.holds(block):
                    self._copy_out(block, now)
        if self._state.disk is not None:
            self._state.disk.begin(now)

    # Out

    def filled(self, block: CachedBlock, now: int) -> None:
        if self.policy.on_fill(block, now):
            self._due[block.id] = block

    def hit(self, blocks: Sequence[CachedBlock], now: int) -> None:
        """A request has claimed these on the device."""
        self._due.update((block.id, block) for block in blocks if self.policy.on_hit(block, now))

    def evicted(self, block: CachedBlock, now: int) -> None:
        """The device's copy goes in this very step; `block.id` is given out anew."""
        if block.key in self._state.host:
            self._touch([block.key], now)
        elif self.policy.on_evict(block, now) or self._due.get(block.id) is block:
            self._copy_out(block, now)

    def _copy_out(self, block: CachedBlock, now: int) -> None:
        if block.key in self._state.host:
            return
        there = self._state.host.keep(block.key, now, block.depth, block.parent)
        if there is not None:
            if self._state.disk is not None:
                kept = self._state.host.get(block.key)
                assert kept is not None
                self._state.disk.arrived(kept, now)
            self._state.copies.append(BlockCopy(None, True, (block.id,), (there,), cached=True))

    def _touch(self, keys: Sequence[bytes], now: int, *, hit: bool = False) -> None:
        self._state.host.touch(keys, now)
        if self._state.disk is not None:
            self._state.disk.used(keys, now, hit=hit)

    # In

    def lookup(self, keys: Sequence[bytes], start: int) -> list[HostBlock]:
        """The cached blocks of a chain that follow the `start` ones on the device, if they are worth fetching."""
        found = self._state.host.lookup(keys, start)
        if found:
            size = self._state.limits.block_size
            if not self.policy.fetches(start * size, len(found) * size, self._state.cost):
                return []
        return found

    def fetch(self, request: Request, hit: Hit, now: int) -> list[int]:
        """Device blocks with the content of what this request hits on the host, which is claimed; there are enough."""
        host = self._state.host
        fresh = self._state.pool.allocate(len(hit.host), now)
        there = tuple(block.id for block in hit.host)
        self._state.copies.append(BlockCopy(request, False, tuple(fresh), there, cached=True))
        host.unclaim(hit.host)
        self._touch([block.key for block in hit.host], now, hit=True)
        return fresh

    def fetch_ahead(self, request: Request, now: int) -> None:
        """The same for a request that waits, as far as there is room: the blocks are idle, as if it had just ended."""
        pool, hit = self._state.pool, self._state.probe(request)
        host = hit.host[: max(0, pool.num_free - num_idle(hit.blocks))]
        if not host:
            return
        pool.claim(hit.blocks, now, request)
        self._state.host.claim(host)
        fresh = self.fetch(request, replace(hit, host=host), now)
        keys, start = request._keys, len(hit.blocks)
        for depth, block_id in enumerate(fresh, start):
            pool.register(block_id, keys[depth], depth, now, keys[depth - 1] if depth else None, request)
        pool.release([*(block.id for block in hit.blocks), *fresh], now)


def merged(copies: Sequence[BlockCopy]) -> list[BlockCopy]:
    """The same copies, neighbours of single blocks on their way out in one."""
    made: list[BlockCopy] = []
    device: list[int] = []
    host: dict[int, None] = {}

    def close() -> None:
        if device:
            made.append(BlockCopy(None, True, tuple(device), tuple(host), cached=True))
            device.clear()
            host.clear()

    for copy in copies:
        if not (copy.out and copy.cached):
            close()
            made.append(copy)
            continue
        if copy.host[0] in host:  # given out anew in the same plan
            close()
        device.append(copy.device[0])
        host[copy.host[0]] = None
    close()
    return made
