"""What parts of a request's service cost, by a cost model that knows whole steps."""

from __future__ import annotations

from policies.contract import CostModel
from policies.shapes import StepShape


def prefill_ns(cost: CostModel, num_tokens: int, start: int = 0) -> int:
    """A step that computes nothing but `num_tokens` tokens of one sequence from position `start` on."""
    pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    end = start + num_tokens
    return cost.step_ns(
        StepShape(
            max_context=end,
            num_chunks=1,
            chunk_tokens=num_tokens,
            chunk_pairs=pairs,
            chunk_context=end,
            num_samples=1,
            padded_tokens=num_tokens,
        )
    )


def decode_ns(cost: CostModel, num_decodes: int, context: int) -> int:
    """A step that gives each of `num_decodes` sequences one token; `context` is summed over them."""
    longest = -(-context // max(1, num_decodes))
    return cost.step_ns(
        StepShape(
            num_decodes=num_decodes,
            decode_context=context,
            max_context=longest,
            num_samples=num_decodes,
            padded_tokens=num_decodes,
        )
    )
