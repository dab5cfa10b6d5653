from __future__ import annotations

from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.registry import register
from policies.request import Request
from policies.service_time import ServiceTime


@register("queue", "las")
class Las(KeyQueue):
    """Least attained service first (foreground-background): needs no prediction.

    Attained service is time: the durations of the steps it took part in, in nanoseconds (`policies.service_time`),
    over all admissions. Not tokens: those computed start from 0 again after a preemption by recompute, so that whoever
    was stopped would look new; and time has one unit for prompts and outputs.
    `quantum_ms`: service counts in whole quanta, ties by arrival (0: to the nanosecond, the textbook's, where two equal
    requests take turns every step).
    Where this departs: a prefill is not stopped midway, since recompute would lose it and two requests could do that to
    each other for ever. O(log n) an arrival.
    Source: Kleinrock, "Queueing Systems" vol. 2, 1976, section 4.6.
    """

    def __init__(self, quantum_ms: float = 0.0) -> None:
        super().__init__()
        if quantum_ms < 0:
            raise ValueError(f"quantum_ms must be 0 or more, not {quantum_ms}")
        self._quantum_ns = max(1, round(quantum_ms * 1e6))
        self._service = ServiceTime()
        self._back: list[Request] = []  # came back since the last report, which may still charge them

    def rank(self, request: Request) -> float:
        return self._service.of(request) // self._quantum_ns

    def preemptible(self, request: Request) -> bool:
        return request.num_pending_tokens <= 1

    def push(self, request: Request, now: int) -> None:
        super().push(request, now)
        if request.first_scheduled_ns is not None:
            self._back.append(request)

    def remove(self, request: Request) -> None:
        super().remove(request)
        if request.state.ended:
            self._service.forget(request)

    def on_report(self, report: Report) -> None:
        self._service.on_report(report)
        for request, _, _ in report.finished:
            self._service.forget(request)
        back, self._back = self._back, []
        for request in back:
            self.rerank(request, report.end_ns)
