"""By when a request is to be served, from its latency objectives."""

from __future__ import annotations

from policies.contract import CostModel, View
from policies.costing import prefill_ns
from policies.plan import FOREVER
from policies.request import Request


def deadline_ns(request: Request) -> int:
    """The time its next objective names; FOREVER where it has none.

    That is the time to first token, or where there is none, or it has been settled by a first token, the end-to-end
    latency. A request that has only a TTFT keeps the place that this gave it.
    """
    slo = request.slo
    if slo is None:
        return FOREVER
    if slo.ttft_ns is not None and (request.num_output_tokens == 0 or slo.e2e_ns is None):
        return request.arrival_ns + slo.ttft_ns
    return FOREVER if slo.e2e_ns is None else request.arrival_ns + slo.e2e_ns


def is_lost(request: Request, view: View, cost: CostModel, now: int) -> bool:
    """Whether its deadline is missed even if all that it has to compute were one step of its own that starts now.

    A lower bound: whoever is lost by it is lost; decodes beside it, and those still to come, are not counted.
    """
    slo = request.slo
    if slo is None or (slo.e2e_ns is None and request.num_output_tokens):
        return False  # no objective, or only one that is met or missed already
    held = request.num_computed_tokens or view.probe(request).num_tokens
    return deadline_ns(request) < now + prefill_ns(cost, request.num_tokens - held, held)
