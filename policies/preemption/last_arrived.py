from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "last_arrived")
class LastArrived(RankedVictim):
    """Preempt whoever arrived last (vLLM v0): the order of arrival holds through preemptions.

    Source: Kwon et al., SOSP 2023, section 4.5: first come, first served, so the latest are preempted first.
    """

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> tuple[int, int]:
        return request.key
