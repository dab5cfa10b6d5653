from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "lowest_priority")
class LowestPriority(RankedVictim):
    """Preempt the lowest class (the largest `Request.priority`), of that whoever arrived last.

    Source: vLLM v1 with `--scheduling-policy priority`.
    """

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> int:
        return request.priority
