"""How often a prefix cache of a given size is hit under an eviction policy: a trace's chains through a real block pool.

Requests are served one after another, each letting go of its blocks before the next comes. That is how the literature
compares eviction policies, and what is left when the batch is taken out of a serving run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.workloads import Workload
from experiments.workloads.block_keys import trace_chains
from policies import registry
from policies.block_pool import BlockPool
from policies.contract import Eviction
from policies.request import Request

Chain = Sequence[bytes]
Maker = Callable[[], Eviction]


@dataclass(frozen=True, slots=True)
class CacheHits:
    """What one policy hit with one size of cache. A hit is a block of an unbroken run from a request's first block on.

    `mean_request`: the mean over requests of the share of their tokens that was hit (an empty prompt has none).
    """

    eviction: str
    num_blocks: int | None  # None: more than there are
    requests: int
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    mean_request: float
    evictions: int
    seconds: float

    @property
    def block_ratio(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_ratio(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def study_cache(
    chains: Sequence[Chain],
    eviction: str | tuple[str, Maker],
    num_blocks: int | None,
    *,
    block_size: int = 16,
    lengths: Sequence[int] | None = None,
) -> CacheHits:
    """Serve chains of block keys, in their order, from a cache of `num_blocks` blocks (None: as many as there are).

    `eviction`: a policy as it is named everywhere, or (what to call it, how to make one). It is told the future if it
    asks for it. `lengths`: tokens of each prompt (default: full blocks). Of a chain longer than the cache, only as much
    is kept as fits.

    Raises:
        ValueError: no such policy (`PolicyError`), a cache of no blocks, or lengths that do not go with the chains.
    """
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; a cache needs at least one block")
    if lengths is None:
        lengths = [len(chain) * block_size for chain in chains]
    if len(lengths) != len(chains):
        raise ValueError(f"{len(lengths)} lengths for {len(chains)} chains")
    name, policy = _make(eviction, chains, block_size)
    room = num_blocks or max(1, len({key for chain in chains for key in chain}))
    pool = BlockPool(room, policy)
    started = time.perf_counter()
    hit_blocks = hit_tokens = registered = 0
    share = 0.0
    for number, (chain, length) in enumerate(zip(chains, lengths, strict=True)):
        owner = Request(number, number, length, 1)
        matched, new = _serve(pool, chain, owner)
        registered += new
        hit_blocks += matched
        tokens = min(matched * block_size, length)
        hit_tokens += tokens
        share += tokens / length if length else 0.0
    return CacheHits(
        name,
        num_blocks,
        len(chains),
        sum(map(len, chains)),
        hit_blocks,
        sum(lengths),
        hit_tokens,
        share / len(chains) if chains else 0.0,
        registered - pool.num_idle,
        time.perf_counter() - started,
    )


def _make(eviction: str | tuple[str, Maker], chains: Sequence[Chain], block_size: int) -> tuple[str, Eviction]:
    if isinstance(eviction, str):
        future = dict(enumerate(chains))
        return eviction, registry.make("eviction", eviction, block_size=block_size, seed=0, oracle={}, future=future)
    name, maker = eviction
    return name, maker()


def _serve(pool: BlockPool, chain: Chain, owner: Request) -> tuple[int, int]:
    """One request comes and goes: how many of its blocks were there, and how many were put there."""
    now = owner.arrival_ns
    hit = pool.lookup(chain)
    pool.claim(hit, now, owner)
    held = [block.id for block in hit]
    held += pool.allocate(min(len(chain) - len(hit), pool.num_free), now)
    new = 0
    for depth in range(len(hit), len(held)):
        parent = chain[depth - 1] if depth else None
        new += pool.register(held[depth], chain[depth], depth, now, parent, owner) is not None
    pool.release(held, now)
    return len(hit), new


def study_workload(
    workload: Workload, evictions: Iterable[str | tuple[str, Maker]], sizes: Iterable[int | None]
) -> list[CacheHits]:
    """`study_cache` of every policy with every size, in blocks of the trace's own size, with its errors."""
    chains = list(trace_chains(workload))
    lengths = workload.prompt_tokens.tolist()
    return [
        study_cache(chains, eviction, size, block_size=workload.hash_block, lengths=lengths)
        for eviction, size in itertools.product(evictions, sizes)
    ]
