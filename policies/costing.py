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


def swap_ns(cost: CostModel, num_tokens: int) -> int:
    """What it adds to two steps to copy the KV of so many tokens (whole blocks) out to host memory, and back in."""
    nothing = cost.step_ns(StepShape())
    out, back = cost.step_ns(StepShape(swapped_out=num_tokens)), cost.step_ns(StepShape(swapped_in=num_tokens))
    return out + back - 2 * nothing


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
