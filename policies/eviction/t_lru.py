from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.idle_blocks import Rank, RankedEviction
from policies.registry import register


@register("eviction", "t_lru")
class TLru(RankedEviction):
    """Tail-optimised LRU: first what a conversation's next turn can do without and still be in time, then LRU.

    "Tail-Optimized Caching for LLM Inference" (NeurIPS 2025, arXiv:2510.15152): a conversation has H tokens, its next
    prompt adds about Q, and a turn is in time if it computes at most `budget` (the paper's xi) of its tokens. Then its
    first

        B = max(0, H + Q - budget)  tokens

    must stay. The blocks that begin at B or behind it are safe to lose: they go first, longest idle first; when there
    are none left, the others do, longest idle first. `budget=0` (nothing is safe) and a budget above all lengths
    (everything is) are both LRU.

    Knobs, in tokens: `budget` (2048), `next_prompt` (Q, 256). The engines that have it take both from the operator,
    as we do; xi follows from the latency objective and the speed of prefills. H is what the block's owner
    (who hit it last, or computed it) had when it let the block go, prompt and output. vLLM's proposal does so too, in
    blocks instead of tokens; SGLang takes the length of a tree node's own chain for H, whoever used it. A shared head
    belongs to whoever used it last: it may be safe under a short conversation while a longer one still stands behind
    it, and is kept then until it is the end of its chain. Blocks of nobody known are not safe. O(log n).
    """

    def __init__(self, budget: int = 2048, next_prompt: int = 256, block_size: int = 16) -> None:
        super().__init__()
        if budget < 0 or next_prompt < 0:
            raise ValueError(f"budget and next_prompt must be 0 or more, not {budget} and {next_prompt}")
        self._slack = next_prompt - budget
        self._block_size = block_size

    def rank(self, block: CachedBlock, now: int) -> Rank:
        if block.owner is None:
            return 1
        needed = max(0, block.owner.num_tokens + self._slack)
        return block.depth * self._block_size < needed
