"""Idle blocks: against a list, and no chain is left with a gap that hides its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from policies import registry
from policies.block_pool import CachedBlock
from policies.contract import Eviction
from policies.idle_blocks import IdleBlocks
from tests.policies.caches import (
    MIXED,
    POLICIES,
    TREE,
    Cache,
    Chain,
    chains,
)


def orphans(cache: Cache, served: Sequence[Chain]) -> int:
    """Blocks in the pool that stand behind a gap."""
    reachable = {block.key for chain in served for block in cache.pool.lookup(chain)}
    return len(cache.pool._index.keys() - reachable)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20, deadline=None)
@given(chains, st.integers(8, 24))
def test_every_cached_block_can_be_found(policy: str, served: list[Chain], num_blocks: int) -> None:
    assert orphans(Cache(served, policy, num_blocks), served) == 0


@pytest.mark.parametrize(
    ("policy", "needs_help"),
    [("fifo", True), ("gdsf,crossover=1", True), ("lfu", False), ("gdsf", False), ("slru", False)],
)
def test_which_policies_would_leave_blocks_that_nobody_finds(policy: str, needs_help: bool) -> None:
    """A count of hits never puts a parent before its child; an age or a cost may."""

    def may_evict_anywhere() -> Eviction:
        made = registry.make("eviction", policy, block_size=1)
        made._idle.leaves_only = False
        return made  # type: ignore[no-any-return]

    lost = [orphans(Cache(MIXED[:n], may_evict_anywhere(), 14), MIXED) for n in range(len(MIXED))]
    assert (max(lost) > 0) is needs_help


class IdleBlocksAgainstAList(RuleBasedStateMachine):
    """The reference looks through all idle blocks for every question."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = IdleBlocks(segments=2)
        self.slow: list[tuple[int, int, int, CachedBlock]] = []  # segment, rank, number, block
        self.count = 0

    @rule(chain=st.integers(0, 2), depth=st.integers(0, 4), rank=st.integers(0, 3), segment=st.integers(0, 1))
    def add(self, chain: int, depth: int, rank: int, segment: int) -> None:
        key, parent = b"%d.%d" % (chain, depth), b"%d.%d" % (chain, depth - 1) if depth else None
        if all(block.key != key for *_, block in self.slow):
            self.count += 1
            block = CachedBlock(self.count, key, depth, parent)
            self.fast.add(block, rank, segment)
            self.slow.append((segment, rank, self.count, block))

    @precondition(lambda self: self.slow)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.slow))
        assert self.fast.discard(entry[3])
        assert not self.fast.discard(entry[3])
        self.slow.remove(entry)

    @rule(segment=st.integers(0, 1))
    def pop(self, segment: int) -> None:
        parents = {block.parent for *_, block in self.slow}
        ends = [e for e in self.slow if e[0] == segment and e[3].key not in parents]
        popped = self.fast.pop(segment)
        if not ends:
            assert popped is None
        else:
            first = min(ends, key=lambda e: (e[1], e[2]))
            assert popped == (first[1], first[3])
            self.slow.remove(first)
        assert len(self.fast) == len(self.slow)
        assert [self.fast.size(s) for s in (0, 1)] == [sum(e[0] == s for e in self.slow) for s in (0, 1)]


TestIdleBlocks = IdleBlocksAgainstAList.TestCase

TestIdleBlocks.settings = settings(max_examples=75, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", [name for name in registry.names("eviction") if name != "lru"])
def test_a_cache_that_is_hit_for_ever_and_never_full_does_not_grow(policy: str) -> None:
    cache = Cache([TREE[-1], TREE[-5]] * 400, policy, 40)
    idle: Any = cache.policy.inner
    assert sum(map(len, idle._idle._heaps)) <= 2 * len(idle._idle) + 65
    if policy == "belady":
        assert len(idle._due) <= 16
