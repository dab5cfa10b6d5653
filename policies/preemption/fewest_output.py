from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "fewest_output")
class FewestOutput(RankedVictim):
    """Preempt whoever has the fewest output tokens, of those the one with the longest prompt (SGLang's retraction).

    The least decoding is lost, and the most memory is freed for it. SGLang retracts until all that remain have memory
    for 20 more tokens; here as many as a step needs.
    Source: SGLang, `managers/schedule_batch.py`, `retract_decode`.
    """

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> tuple[int, int]:
        return (-request.num_output_tokens, request.num_prompt_tokens)
