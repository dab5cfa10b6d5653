from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from policies import registry
from policies.contract import CostModel
from policies.costing import decode_ns, prefill_ns
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import FOREVER, Report
from policies.registry import register
from policies.request import Request

Key = TypeVar("Key", bound=Hashable)
MOST_REMEMBERED = 1 << 16


def remember(known: dict[Key, int], key: Key, value: int) -> int:
    """Keep what the cost model has said, of not too many lengths."""
    if len(known) >= MOST_REMEMBERED:
        known.clear()
    known[key] = value
    return value


@register("queue", "least_slack")
class LeastSlack(KeyQueue):
    """Least slack first (LSTF): who can least afford to wait longer, by predicted lengths and the cost model.

    slack = deadline - now - remaining service time. `now` is the same for all, and what a waiting request still needs
    does not change while it waits, so slacks of waiting requests fall at one rate and keep their order: the rank is
    deadline - remaining, set once, in nanoseconds. It is also the latest time to start. Where a request has several
    objectives, the one with the least slack counts:

    - until the first token, arrival + `slo.ttft_ns`, with the prefill remaining;
    - arrival + `slo.e2e_ns`, with the prefill and the predicted output that is left, one decode step a token.

    Requests without an objective (left) come last, first come, first served. A running request's slack stays as it
    is while it alone runs, which is how `preemptive` sees it.
    `predictor`: of output lengths; `batch`: how many requests are assumed to share a decode step.
    Where this departs: prefix hits are not counted on, as they may be gone by then. Needs a cost model, which tells the
    remaining time. O(log n) and two evaluations of the cost model an arrival.
    Source: least laxity, Mok, 1983; least slack time first, Leung, Algorithmica 4, 1989.
    """

    needs_cost = True

    def __init__(
        self, predictor: str = "declared", batch: int = 1, oracle: Mapping[int, int] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self._batch = batch
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self._cost: CostModel | None = None
        self._prefills: dict[tuple[int, int], int] = {}  # nanoseconds, by tokens to compute and computed before
        self._decodes: dict[int, int] = {}  # and by context: `preemptive` asks for all who run in every plan
        self._unranked: dict[int, Request] = {}  # who came before the cost model did, with the first plan

    def begin(self, draft: Draft, now: int) -> None:
        if self._cost is None:
            self._cost = draft.view.cost
            unranked, self._unranked = self._unranked, {}
            for request in unranked.values():
                super().push(request, now)

    def push(self, request: Request, now: int) -> None:
        if self._cost is None:
            self._unranked[request.id] = request
        else:
            super().push(request, now)

    def remove(self, request: Request) -> None:
        self._unranked.pop(request.id, None)
        super().remove(request)

    def rank(self, request: Request) -> float:
        slo = request.slo
        if slo is None or self._cost is None:
            return FOREVER
        latest, output = FOREVER, request.num_output_tokens
        if slo.ttft_ns is not None and output == 0:
            latest = request.arrival_ns + slo.ttft_ns - self._prefill_ns(request)
        if slo.e2e_ns is not None:
            left = max(0, round(self._predictor.predict(request)) - output - 1)
            context = request.num_tokens + left // 2  # the mean, on the way to the end
            remaining = self._prefill_ns(request) + left * self._decode_ns(context)
            latest = min(latest, request.arrival_ns + slo.e2e_ns - remaining)
        return latest

    def _prefill_ns(self, request: Request) -> int:
        held = request.num_computed_tokens
        key = (request.num_tokens - held, held)
        known = self._prefills.get(key)
        if known is None:
            assert self._cost is not None
            known = remember(self._prefills, key, prefill_ns(self._cost, *key))
        return known

    def _decode_ns(self, context: int) -> int:
        known = self._decodes.get(context)
        if known is None:
            assert self._cost is not None
            known = remember(self._decodes, context, decode_ns(self._cost, self._batch, self._batch * context))
        return known

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)
