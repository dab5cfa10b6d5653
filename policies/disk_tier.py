"""Cached prefixes on disk, behind those in host memory: what is written there as the offload policy says, and read back
for a hit.

The policy is asked about a block of host memory as it is about one of the device: when it has got its content, when it
is hit there, and when it is about to go, which is before the host needs the room: writing takes its time, so the blocks
used longest ago are written while there is a share of host memory left that is free or already on disk.

Blocks go beside the steps. A step names those that are to go from now on (`Step.disk`); that one has arrived, or has
not and why, is told to the control plane before a later plan, and stands in the record like whatever else comes from
outside. Until then its place on the host and its place on disk are nobody else's.

A request that hits blocks on disk waits until they are on the host, once: what has not come then, or has gone again, it
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policies.contract import CostModel, Offload
from policies.disk_pool import DiskBlock, DiskPool
from policies.host_pool import HostBlock
from policies.plan import DiskCopy
from policies.request import Request
from policies.shapes import StepShape

if TYPE_CHECKING:
    from policies.replica_state import ReplicaState

MOST_WRITES = 128
"""So many blocks are on their way to disk at once, half of host memory at most, as none of them can be evicted there
meanwhile."""
CLEAN = 2
"""One host block of so many is to be free, or on disk too."""


@dataclass(frozen=True, slots=True)
class WithReading:
    """What steps cost where blocks come from disk first: that comes on top of any copy from the host."""

    cost: CostModel
    reading_ns: int

    def step_ns(self, shape: StepShape) -> int:
        return self.cost.step_ns(shape) + (self.reading_ns if shape.swapped_in else 0)


class DiskTier:
    """The disk's part in a replica's prefix cache."""

    def __init__(self, state: ReplicaState) -> None:
        self._state = state
        self.pool = DiskPool(state.limits.num_disk_blocks)
        state.host.on_forget = self._forgotten
        self._unwritten: dict[bytes, HostBlock] = {}  # cached on the host alone, used longest ago first
        self._wanted: dict[bytes, HostBlock] = {}  # of those, what is to be written as soon as it can
        self._asked: list[DiskCopy] = []  # in no step yet
        self._next = 0
        self._now = 0
        self._writes: dict[int, tuple[DiskBlock, HostBlock]] = {}
        self._reads: dict[int, tuple[DiskBlock, int]] = {}  # and the host block that it comes to
        self._coming: dict[bytes, int] = {}  # key -> the read that brings it
        self.num_dropped = 0
        """Blocks that could not be written, or not in time, or not read back as they were."""

    @property
    def _policy(self) -> Offload:
        return self._state.stack.offload

    @property
    def num_underway(self) -> int:
        """Blocks on their way, or asked for."""
        return len(self._writes) + len(self._reads)

    # Out

    def arrived(self, block: HostBlock, now: int) -> None:
        """The host keeps a block that the disk may lack."""
        if block.key in self._unwritten or self.pool.get(block.key) is not None:
            return
        self._unwritten[block.key] = block
        if self._policy.on_fill(block, now):
            self._wanted[block.key] = block

    def used(self, keys: Sequence[bytes], now: int, *, hit: bool) -> None:
        """These host blocks are used now; `hit`: fetched for a request. A chain's end comes first."""
        for key in reversed(keys):
            block = self._unwritten.pop(key, None)
            if block is None and (block := self._state.host.get(key)) is None:
                continue
            there = self.pool.get(key)
            if there is not None:
                self.pool.touch(there, now)
            else:
                self._unwritten[key] = block
            if hit:
                block.hits += 1
                if there is None and self._policy.on_hit(block, now):
                    self._wanted[key] = block

    def _forgotten(self, block: HostBlock, for_room: bool) -> None:
        unwritten = self._unwritten.pop(block.key, None) is not None
        wanted = self._wanted.pop(block.key, None) is not None
        if for_room and (wanted or (unwritten and self._policy.on_evict(block, self._now))):
            self.num_dropped += 1  # too late

    def begin(self, now: int) -> None:
        """A plan is about to be made: what is to be written now?"""
        self._now = now
        since = self._policy.keeps_since(now)
        if since is not None:
            self.pool.expire(since)
        host, unwritten = self._state.host, self._unwritten
        few, most = -(-host.num_blocks // CLEAN), min(MOST_WRITES, max(1, host.num_blocks // 2))
        while unwritten and host.num_unused + host.num_cached - len(unwritten) < few:
            if len(self._writes) >= most:
                return
            key, block = next(iter(unwritten.items()))
            del unwritten[key]
            if self._wanted.pop(key, None) is not None or self._policy.on_evict(block, now):
                self._write(block, now)
        while self._wanted and len(self._writes) < most:
            key, block = next(iter(self._wanted.items()))
            del self._wanted[key], unwritten[key]
            self._write(block, now)

    def _write(self, block: HostBlock, now: int) -> None:
        there = self.pool.keep(block.key, now, block.depth, block.parent)
        if there is None:
            self.num_dropped += 1
            return
        self._state.host.claim([block])
        self._writes[self._ask(True, there, block.id)] = there, block

    def _ask(self, out: bool, there: DiskBlock, host: int) -> int:
        number, self._next = self._next, self._next + 1
        self._asked.append(DiskCopy(number, out, there.id, host, there.key))
        return number

    def take(self) -> list[DiskCopy]:
        """What is to go from now on; nothing where copies to host memory and from it wait for a step that runs."""
        if self._state.copies:
            return []
        asked, self._asked = self._asked, []
        return asked

    # In

    def num_awaited(self, request: Request, keys: Sequence[bytes], start: int) -> int:
        """Blocks that this request is to wait for: of its chain behind the `start` ones on the device, those that are
        on disk alone, if they are worth reading; once it has asked, those that are still on their way."""
        if request._reads is not None:
            return sum(number in self._reads for number in request._reads.values())
        length, found = self._on_disk(keys, start)
        if not found:
            return 0
        state = self._state
        size, cost = state.limits.block_size, state.cost
        if cost is not None:
            cost = WithReading(cost, len(found) * state.limits.disk_read_ns)
        return len(found) if self._policy.fetches(start * size, length * size, cost) else 0

    def _on_disk(self, keys: Sequence[bytes], start: int) -> tuple[int, list[DiskBlock]]:
        """How many blocks of the chain follow on host and disk, and which of them are on disk alone."""
        found: list[DiskBlock] = []
        host = self._state.host
        for depth in range(start, len(keys)):
            if keys[depth] in host:
                continue
            block = self.pool.get(keys[depth])
            if block is None or not block.written:
                return depth - start, found
            found.append(block)
        return max(0, len(keys) - start), found

    def fetch_ahead(self, request: Request, now: int) -> None:
        """Have read what this request is to wait for, as far as the host has room."""
        if request._reads is not None:
            return
        state = self._state
        keys = request._keys[: (request.num_tokens - 1) // state.limits.block_size]
        start = len(state.pool.lookup(keys))
        if not self.num_awaited(request, keys, start):
            return
        length, found = self._on_disk(keys, start)
        chain = [kept for key in keys[start : start + length] if (kept := state.host.get(key)) is not None]
        state.host.touch([block.key for block in chain], now)
        self.used([block.key for block in chain], now, hit=False)
        state.host.claim(chain)
        request._reads = {}
        for block in found:
            number = self._coming.get(block.key)
            if number is None:
                there = state.host.expect()
                if there is None:
                    break
                block.busy = True
                number = self._coming[block.key] = self._ask(False, block, there)
                self._reads[number] = block, there
            self.pool.touch(block, now)
            request._reads[block.key] = number
        state.host.unclaim(chain)

    # What became of it

    def done(self, number: int, error: str, now: int) -> None:
        """A block has arrived, or (`error`) has not; nobody is served otherwise for that than by computing it."""
        self.num_dropped += bool(error)
        if number in self._writes:
            there, block = self._writes.pop(number)
            counts = self.pool.settle(there)
            there.written = not error
            if counts and error:
                self.pool.drop(there)
            self._state.host.unclaim([block])
            return
        there, host_block = self._reads.pop(number)
        del self._coming[there.key]
        counts = self.pool.settle(there)
        if counts and not error:
            self._state.host.land(host_block, there.key, now, there.depth, there.parent)
            self.pool.touch(there, now)
            self._unwritten.pop(there.key, None)
            self._wanted.pop(there.key, None)
            return
        self._state.host.abandon(host_block)
        if counts:
            self.pool.drop(there)

    def check(self) -> None:
        """Raise AssertionError where blocks are not conserved."""
        self.pool.check(self.num_underway)
        host = self._state.host
        for key, block in self._unwritten.items():
            assert host.get(key) is block, "a block is to be written that the host has not"
        assert self._wanted.keys() <= self._unwritten.keys(), "a block is to be written that has been"
        assert set(self._coming.values()) == self._reads.keys(), "a read brings nothing"
