from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import Rank, RankedEviction
from policies.registry import register
from policies.use_counts import UseCounts


@register("eviction", "gdsf")
class Gdsf(RankedEviction):
    """GreedyDual-Size-Frequency: evict the block of least H = L + uses * cost / size, where L grows as blocks go.

    Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs TR 98-69,
    1998: a document has H when it is used, L is the H of the last one evicted, so what is not used any more is
    overtaken in time by what is new. Here H is worked out when the block's last holder lets go of it, and

        uses = 1 + hits        (since the block was computed; `remember=true`: ever; `frequency=false`: 1)
        size = 1               (all blocks have the same)
        cost = 1 + position / crossover

    with the block's first token's `position` in its chain: recomputing a block is linear work and attention to all
    that stands before it. `crossover` is the context, in tokens, at which attention to it costs as much as all else
    (for an 8B model some 30,000); None (the default): cost is 1 everywhere. RAGCache (arXiv:2404.12457) has the same
    formula for the nodes of a tree, with measured costs, and evicts leaves alone; so here, which matters where deep
    blocks are dear: they must not outlive their parents. A leaf may then have a larger H than its parent, and L must
    not fall after it went: L = max(L, H). With uniform cost and without frequency this is LRU. O(log n).
    """

    def __init__(
        self, crossover: int | None = None, frequency: bool = True, remember: bool = False, block_size: int = 16
    ) -> None:
        super().__init__()
        if crossover is not None and crossover < 1:
            raise ValueError(f"crossover must be at least 1 token, not {crossover}")
        self._crossover = crossover
        self._frequency = frequency
        self._uses = UseCounts(remember)
        self._block_size = block_size
        self._inflation = 0.0  # the paper's L

    def rank(self, block: CachedBlock, now: int) -> Rank:
        cost = 1.0 if self._crossover is None else 1.0 + block.depth * self._block_size / self._crossover
        uses = 1 + self._uses.hits(block) if self._frequency else 1
        return self._inflation + uses * cost

    def on_evict(self, block: CachedBlock, rank: Rank) -> None:
        assert isinstance(rank, float)
        self._inflation = max(self._inflation, rank)
        self._uses.on_evict(block)
