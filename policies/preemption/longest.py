from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "longest")
class Longest(RankedVictim):
    """Preempt the longest context: the most memory for one victim, and the most to compute again.

    A control for `most_blocks`, which counts what preempting really frees.
    Who was admitted first is spared (`policies.victims`).
    """

    spares_eldest = True

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> int:
        return request.num_computed_tokens
