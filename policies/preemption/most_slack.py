from __future__ import annotations

from policies.contract import View
from policies.deadline import deadline_ns
from policies.draft import Draft
from policies.plan import FOREVER
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "most_slack")
class MostSlack(RankedVictim):
    """Preempt whoever has the most time before its latency objectives want the next thing of it.

    Due, with an end-to-end objective, is the end; with a TPOT alone the next token, at first token + TPOT * tokens so
    far; before the first token, that. Who has no objective goes first.
    """

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> int:
        slo = request.slo
        if slo is not None and slo.e2e_ns is None and request.first_token_ns is not None:
            if slo.tpot_ns is None:
                return FOREVER  # its TTFT is past, and nothing else is asked
            return request.first_token_ns + slo.tpot_ns * request.num_output_tokens
        return deadline_ns(request)
