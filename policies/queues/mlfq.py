from __future__ import annotations

import heapq

from policies.contract import CostModel
from policies.costing import prefill_ns
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.registry import register
from policies.request import Request
from policies.service_time import ServiceTime


@register("queue", "mlfq")
class Mlfq(KeyQueue):
    """Skip-join multi-level feedback queue (FastServe), for `preemptive,mode=keep`.

    Level i has a quantum of `quantum_ms` * 2^i. A request joins the first level whose quantum is at least the time that
    its prompt's prefill takes alone, by the cost model; without one everybody joins level 0, which is naive MLFQ. It
    moves one level down when its service in a level exceeds the quantum, down to the last of `levels`, which has none.
    Within a level first come, first served by when it entered the level, so that a preempted one is at the front again.
    Who waits below the top for `alpha_ms` at a stretch is promoted to the top with a fresh meter (0: never).

    Where code and paper differ: the paper promotes after 300 ms, the code after 3 s and looks every 1000 iterations by
    the wall clock; here as the paper, with a plan asked for at that time. Where this departs from both: service beyond
    a quantum counts in the next level instead of being forgotten, and KV stays on the device (KEEP), is recomputed or
    goes to host memory as `preemptive` is told, but not proactively. With `quantum_ms=0` there is one level, and
    whoever ran goes to its end: round robin. One level is first come, first served.
    Cost: O(running) a plan, O(log n) an arrival or a promotion.
    Source: Wu et al., "Fast Distributed Inference Serving for Large Language Models", arXiv 2305.05920.
    """

    def __init__(self, quantum_ms: float = 10.0, levels: int = 16, alpha_ms: float = 300.0) -> None:
        super().__init__()
        if quantum_ms < 0 or alpha_ms < 0 or not 1 <= levels <= 64:
            raise ValueError("quantum_ms and alpha_ms must be 0 or more, levels between 1 and 64")
        self._quantum = round(quantum_ms * 1e6)
        self._last = levels - 1 if self._quantum else 0
        self._alpha = round(alpha_ms * 1e6)
        self._cost: CostModel | None = None
        self._begun = False
        self._unranked: dict[int, Request] = {}  # who came before the cost model did, with the first plan
        self._place: dict[int, tuple[int, int]] = {}  # level, and when it was entered
        self._meter: dict[int, int] = {}  # service at which the present level's count began
        self._known: dict[int, Request] = {}
        self._since: dict[int, int] = {}  # waiting request below the top -> since when it waits
        self._due: list[tuple[int, int, int]] = []  # promotions to come: (time, *key), old entries among them
        self._service = ServiceTime()

    def level(self, request: Request) -> int:
        return self._join(request)[0]

    def rank(self, request: Request) -> tuple[float, ...]:
        return self._join(request)

    def _join(self, request: Request) -> tuple[int, int]:
        if request.id not in self._place:
            level = 0
            if self._cost is not None and self._quantum:
                needs = prefill_ns(self._cost, request.num_prompt_tokens)
                while level < self._last and self._quantum << level < needs:
                    level += 1
            self._place[request.id] = (level, request.arrival_ns)
            self._meter[request.id] = self._service.of(request)
            self._known[request.id] = request
        return self._place[request.id]

    def push(self, request: Request, now: int) -> None:
        if not self._begun:
            self._unranked[request.id] = request
            return
        if request.id in self._waiting:
            return
        super().push(request, now)
        if self._alpha and self.level(request) > 0:
            self._since[request.id] = now
            heapq.heappush(self._due, (now + self._alpha, *request.key))

    def pop(self, now: int) -> Request:
        request = super().pop(now)
        self._since.pop(request.id, None)
        return request

    def remove(self, request: Request) -> None:
        self._unranked.pop(request.id, None)
        self._since.pop(request.id, None)
        super().remove(request)

    def begin(self, draft: Draft, now: int) -> None:
        self._service.begin(draft.view)
        if not self._begun:
            self._begun, self._cost = True, draft.view.cost
            unranked, self._unranked = self._unranked, {}
            for request in unranked.values():
                self.push(request, now)
        for request in draft.view.running.values():
            self._demote(request, now)
        self._promote(draft, now)
        if len(self._known) > 2 * (len(self._waiting) + len(draft.view.running)) + 64:
            for request in [r for r in self._known.values() if r.state.ended]:
                self._forget(request)

    def _demote(self, request: Request, now: int) -> None:
        level = self._join(request)[0]
        served = self._service.of(request)
        if not self._quantum and served > self._meter[request.id]:
            self._place[request.id] = (0, now)
            self._meter[request.id] = served
        while level < self._last and served - self._meter[request.id] > self._quantum << level:
            self._meter[request.id] += self._quantum << level
            level += 1
            self._place[request.id] = (level, now)

    def _promote(self, draft: Draft, now: int) -> None:
        while self._due:
            due, _, name = self._due[0]
            if self._since.get(name, due) + self._alpha == due:
                if due > now:
                    draft.wake_at(due)
                    return
                request = self._known[name]
                self._place[name] = (0, now)
                self._meter[name] = self._service.of(request)
                self.rerank(request, now)
            heapq.heappop(self._due)

    def on_report(self, report: Report) -> None:
        self._service.on_report(report)
        for request, _, _ in report.finished:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        for kept in (self._place, self._meter, self._known, self._since):
            kept.pop(request.id, None)
        self._service.forget(request)
