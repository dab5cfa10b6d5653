from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from policies.contract import CostModel, View
from policies.costing import decode_ns
from policies.draft import Draft
from policies.plan import Plan, Report
from policies.queued import QueuedScheduler
from policies.queues.edf import Edf
from policies.registry import register
from policies.request import Request

TPOT_GUARD = "TPOT guard"


@register("scheduler", "scorpio")
class Scorpio(QueuedScheduler):
    """SCORPIO: sheds who misses the TTFT, admits while the tightest TPOT holds, lets the others decode less often.

    TTFT guard: the earliest deadline goes first, and who can no longer meet it is rejected (the queue `edf,shed=drop`,
    which this scheduler has built in: requests that are not `slo.droppable` are put behind all others instead).

    TPOT guard: request i needs a token every t_i = `slo.tpot_ns`. With t the tightest of those running, i is to decode
    in a share p_i = t / t_i of the steps.
    - Admission: the virtual batch, VBS = sum of p_i with context sum of p_i * context_i, is what a step decodes on
      average. The head is admitted while a decode step of the virtual batch, it included, takes at most t by the cost
      model; nobody overtakes it.
    - Credit-based batching: each step earns i a credit of p_i; it decodes when it has a whole credit, which it pays.
      Who has twice the tightest TPOT decodes in every second step.
    All running partial prefills run, as in `mixed`. Requests without a TPOT, and those whose TPOT one request alone
    would miss, decode in every step and bind nobody.

    Where this departs: the formulas are rebuilt from the paper's description of its parts. It predicts lengths and the
    time until the head of the queue gets its turn; here nothing is predicted but a step's time, by the cost model, and
    the head is rejected only once its prefill alone would miss the deadline (see `edf`). The guard holds when it lets
    somebody in, for an average decode step with the contexts of that time: these grow, requests whose credits fall due
    together make single steps longer, and so do prefill chunks, which a small `max_num_batched_tokens` bounds.
    Credits are kept as one clock for all, in whole nanoseconds: it moves by t a step, and i owes t_i a token. Tokens of
    steps in flight count, so that `lag=1` batches alike.
    Needs a cost model. O(running) a step.
    Source: Tang et al., "SCORPIO", arXiv 2505.23022, sections on the TTFT guard and the TPOT guard.
    """

    needs_cost = True

    def __init__(self) -> None:
        super().__init__(Edf(shed="drop"))
        self._tpot: dict[int, int | None] = {}  # as it counts, from when it was first looked at
        self._clock = 0  # the tightest TPOT, summed over the steps planned
        self._pace = 0  # the tightest TPOT in the last of them
        self._joined: dict[int, tuple[int, int]] = {}  # request that decodes -> clock and output tokens when it began

    def add(self, request: Request, now: int) -> None:
        super().add(request, now)
        self._joined.pop(request.id, None)  # if it was preempted

    def remove(self, request: Request, now: int) -> None:
        super().remove(request, now)
        self._forget(request)

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        for request, _, _ in report.finished:
            self._forget(request)

    def on_repeat(self) -> None:
        """A step goes by in which the same requests decode as in the last one planned."""
        self._clock += self._pace

    def _forget(self, request: Request) -> None:
        self._joined.pop(request.id, None)
        self._tpot.pop(request.id, None)

    def plan(self, view: View, now: int) -> Plan:
        draft, cost = self.start(view, now), view.cost
        assert cost is not None, "a scheduler that needs a cost model is never put where there is none"
        for request, _ in draft.plan.drop:
            self._forget(request)
        batch, known = VirtualBatch(), self._tpot
        running = view.running.values()
        batch.add_all(
            [known[r.id] if r.id in known else self._tpot_of(r, cost) for r in running], [r.num_tokens for r in running]
        )
        resting = self._short_of_credit(view, batch)
        if resting or not draft.run_everyone():
            self._run(view, draft, resting, now)
        if draft.num_tokens == 0 and resting:
            self._run(view, draft, {}, now)  # nobody who has credit could run
        if not draft.preempted:
            self._admit(draft, batch, cost, now)
        return draft.finish()

    def _tpot_of(self, request: Request, cost: CostModel) -> int | None:
        if request.id not in self._tpot:
            tpot = None if request.slo is None else request.slo.tpot_ns
            alone = decode_ns(cost, 1, request.num_tokens)
            self._tpot[request.id] = None if tpot is None or tpot < alone else tpot
        return self._tpot[request.id]

    def _short_of_credit(self, view: View, batch: VirtualBatch) -> dict[int, Request]:
        """A step goes by. Who decodes and has no whole credit now."""
        self._pace = batch.tightest or 0
        if batch.tightest is None:
            return {}
        resting, tpots, joined, began = dict[int, Request](), self._tpot, self._joined, self._clock
        clock = self._clock = began + self._pace
        for request in view.decoding():
            request_id, output = request.id, request.num_output_tokens
            tpot = tpots[request_id]
            if tpot is not None:
                if request_id not in joined:
                    joined[request_id] = (began, output)
                since, before = joined[request_id]
                if clock - since < (output - before + 1) * tpot:
                    resting[request_id] = request
        return resting

    def _run(self, view: View, draft: Draft, resting: dict[int, Request], now: int) -> None:
        for request in list(view.running.values()):
            done = request.num_output_tokens >= request.max_tokens
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if not done and tokens and request.id not in draft.preempted and request.id not in resting:
                draft.run_or_preempt(request, tokens, now)

    def _admit(self, draft: Draft, batch: VirtualBatch, cost: CostModel, now: int) -> None:
        while (head := self.queue.peek(now)) is not None:
            tpot = self._tpot_of(head, cost)
            if not batch.allows(tpot, head.num_tokens, cost):
                draft.plan.blocked.append((head, TPOT_GUARD))
                return
            if not draft.admit(head):
                return
            self.queue.pop(now)
            batch.add(tpot, head.num_tokens)


class VirtualBatch:
    """What a step decodes on average, if each request keeps its own pace: requests and contexts weighed by t / t_i."""

    def __init__(self) -> None:
        self.tightest: int | None = None
        self._paces = 0.0  # sum of 1 / t_i
        self._paced_context = 0.0  # sum of context / t_i
        self._others = 0  # decode in every step
        self._others_context = 0

    def add(self, tpot: int | None, context: int) -> None:
        self.add_all([tpot], [context])

    def add_all(self, tpots: Sequence[int | None], contexts: Sequence[int]) -> None:
        tightest, paces, paced_context = self.tightest, self._paces, self._paced_context
        for tpot, context in zip(tpots, contexts, strict=True):
            if tpot is None:
                self._others += 1
                self._others_context += context
            else:
                if tightest is None or tpot < tightest:
                    tightest = tpot
                paces += 1 / tpot
                paced_context += context / tpot
        self.tightest, self._paces, self._paced_context = tightest, paces, paced_context

    def size(self) -> float:
        return self._others + self._paces * (self.tightest or 0)

    def context(self) -> float:
        return self._others_context + self._paced_context * (self.tightest or 0)

    def allows(self, tpot: int | None, context: int, cost: CostModel) -> bool:
        """Whether one more may decode with these. One alone always may."""
        more = copy.copy(self)
        more.add(tpot, context)
        if more.tightest is None or (self.tightest is None and not self._others):
            return True
        whole = math.ceil(round(more.size(), 6))  # shares that should add up to a whole number do
        return decode_ns(cost, whole, round(more.context())) <= more.tightest
