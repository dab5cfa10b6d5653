from __future__ import annotations

from policies.deadline import deadline_ns, is_lost
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import FOREVER, Report
from policies.registry import register
from policies.request import Request

UNATTAINABLE = "its deadline can no longer be met"


@register("queue", "edf")
class Edf(KeyQueue):
    """Earliest deadline first; whoever can no longer meet it may be shed.

    The deadline is arrival + `slo.ttft_ns`, or without one (or once the first token is out) arrival + `slo.e2e_ns`.
    Requests without an objective come last, first come, first served. Under `preemptive` it is the textbook's EDF: at
    one request at a time, with free preemption, it meets all deadlines that can be met together (Liu and Layland, 1973;
    Dertouzos, 1974). In overload it serves the most urgent, who are the ones already late, and collapses as FCFS
    does; shedding is what saves it.

    `shed`: what becomes of a request at the head whose deadline lies before now + its prefill by the cost model (a
    lower bound: only lost ones are shed): `none`; `drop` ends it where `slo.droppable` says that it may, and demotes it
    otherwise; `demote` lets it wait with those that have no objective. `drop` and `demote` need a cost model.
    Where this departs: a lost request is found when it is at the head, not when it is lost; under this order that is
    before anybody with a later deadline starts. The time that it still has to wait is not estimated.
    O(log n) an arrival; a step probes the head once, and once more for each that it sheds.
    """

    def __init__(self, shed: str = "none") -> None:
        super().__init__()
        if shed not in ("none", "drop", "demote"):
            raise ValueError(f"shed must be none, drop or demote, not {shed!r}")
        self._shed = shed
        self._demoted: set[int] = set()
        self.needs_cost = shed != "none"

    def rank(self, request: Request) -> float:
        return FOREVER if request.id in self._demoted else deadline_ns(request)

    def begin(self, draft: Draft, now: int) -> None:
        cost = draft.view.cost
        if self._shed == "none" or cost is None:
            return
        while (head := self.peek(now)) is not None and self.rank(head) < FOREVER:
            if not is_lost(head, draft.view, cost, now):
                return
            self.pop(now)
            if self._shed == "drop" and head.slo is not None and head.slo.droppable:
                draft.drop(head, UNATTAINABLE)
            else:
                self._demoted.add(head.id)
                self.push(head, now)

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._demoted.discard(request.id)

    def on_report(self, report: Report) -> None:
        for request, _, _ in report.finished:
            self._demoted.discard(request.id)
