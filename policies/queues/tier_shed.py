from __future__ import annotations

from policies.draft import Draft
from policies.queues.fcfs import Fcfs
from policies.registry import register
from policies.request import Request

OVERLOAD = "overload: only higher tiers are admitted"


@register("queue", "tier_shed")
class TierShed(Fcfs):
    """First come, first served; under overload, newcomers of low tiers are turned away.

    The tier is `Request.priority`, lower is better. While more than `max_waiting` requests wait, those that have come
    since the last step with a priority above `tier` are dropped, the last to come first, as long as `slo.droppable`
    allows. Newcomers count themselves, also those that would start at once. Who has waited through a step, or has run
    before, stays.
    Where this departs: BLIS asks each request by itself when it arrives; here a step asks all newcomers together.
    O(newcomers log newcomers) a step.
    Source: `TierShed` of BLIS (inference-sim), which admits under overload only tiers from a minimum on.
    """

    def __init__(self, max_waiting: int = 100, tier: int = 0) -> None:
        super().__init__()
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, not {max_waiting}")
        self._max_waiting = max_waiting
        self._tier = tier
        self._new: list[Request] = []

    def push(self, request: Request, now: int) -> None:
        super().push(request, now)
        if request.first_scheduled_ns is None:
            self._new.append(request)

    def begin(self, draft: Draft, now: int) -> None:
        new, self._new = sorted(self._new, key=lambda r: r.key, reverse=True), []
        for request in new:
            low = request.priority > self._tier and request.slo is not None and request.slo.droppable
            if low and request.id in self._waiting and len(self._waiting) > self._max_waiting:
                self.remove(request)
                draft.drop(request, OVERLOAD)
