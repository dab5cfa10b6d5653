"""A pool under an eviction policy that serves chains of blocks one after another, and chains to serve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st

from policies import registry
from policies.block_pool import BlockPool, CachedBlock
from policies.contract import Eviction
from policies.prefix import block_keys
from policies.random_stream import RandomStream
from policies.request import Request

POLICIES = [*registry.names("eviction"), "gdsf,crossover=8", "gdsf,remember=true", "lfu,remember=true"]

Chain = tuple[bytes, ...]


class Watched:
    """A policy, the order in which it let blocks go, and the keys that its pool has."""

    def __init__(self, inner: Eviction) -> None:
        self.inner = inner
        self.on_idle, self.on_hit = inner.on_idle, inner.on_hit
        self.victims: list[bytes] = []

    def pop_victim(self, now: int) -> CachedBlock:
        block = self.inner.pop_victim(now)
        self.victims.append(block.key)
        return block


class Cache:
    """Chains served one after another from a pool; `hits` has the number of blocks that each hit."""

    def __init__(self, chains: Sequence[Chain], policy: str | Eviction, num_blocks: int, block_size: int = 4) -> None:
        if isinstance(policy, str):
            future = dict(enumerate(chains))
            policy = registry.make("eviction", policy, block_size=block_size, seed=0, oracle={}, future=future)
        assert not isinstance(policy, str)
        self.policy = Watched(policy)
        self.pool = BlockPool(num_blocks, self.policy)
        self.hits: list[int] = []
        for number, chain in enumerate(chains):
            owner = Request(number, number, len(chain) * block_size, 1)
            hit = self.pool.lookup(chain)
            self.pool.claim(hit, number, owner)
            held = [block.id for block in hit]
            held += self.pool.allocate(min(len(chain) - len(hit), self.pool.num_free), number)
            for depth in range(len(hit), len(held)):
                parent = chain[depth - 1] if depth else None
                self.pool.register(held[depth], chain[depth], depth, number, parent, owner)
            self.pool.release(held, number)
            self.pool.check([])
            self.hits.append(len(hit))


def single(string: Sequence[int]) -> list[Chain]:
    """Each reference a chain of one block: the classic setting."""
    return [(b"%d" % page,) for page in string]


def faults(string: Sequence[int], policy: str, frames: int) -> int:
    return len(string) - sum(Cache(single(string), policy, frames).hits)


strings = st.lists(st.integers(0, 9), max_size=120)

skewed = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 15)), max_size=150)

TREE = [tuple(block_keys(tokens, 1)) for n in (1, 3, 5, 8) for tokens in itertools.islice(
    ([a] * min(n, 3) + [b] * max(0, n - 3) for a in range(3) for b in range(4)), 12)]  # fmt: skip
"""Chains of 1 to 8 blocks that share heads of up to three."""

MIXED = [TREE[i] for i in RandomStream(3, "mixed").uint64_array(list(range(60))) % len(TREE)]

chains = st.lists(st.sampled_from(TREE), max_size=60)


def victims(policy: str, served: Sequence[Chain], num_blocks: int) -> list[bytes]:
    return Cache(served, policy, num_blocks).policy.victims
