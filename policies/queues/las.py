from __future__ import annotations

from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Mode, Report
from policies.registry import register
from policies.request import Request
from policies.service_time import ServiceTime


@register("queue", "las")
class Las(KeyQueue):
    """Least attained service first (foreground-background): needs no prediction; for `preemptive`.

    Attained service is time: the durations of the steps it took part in, in nanoseconds (`policies.service_time`). A
    chunk of tokens of which some were computed before, and lost by recompute, is charged with its share of new ones:
        duration * new tokens / tokens
    So who was stopped comes back with the service that it had, and keeps its place while it is computed again: the
    order of two requests changes only with a token that one of them never had computed before. That they cannot stop
    each other for ever is the rule of `preemptive`: nobody is stopped before it has got a token.
    `quantum_ms`: service counts in whole quanta, ties by arrival, so equal requests take turns of that length. A turn
    costs a recompute unless blocks are kept, so it should be longer than one. 0: to the nanosecond, the textbook's,
    where they take turns every step.
    Where this departs: a prefill is not stopped midway. O(log n) an arrival, O(what changed) a report.
    Source: Kleinrock, "Queueing Systems" vol. 2, 1976, section 4.6.
    """

    def __init__(self, quantum_ms: float = 100.0) -> None:
        super().__init__()
        if quantum_ms < 0:
            raise ValueError(f"quantum_ms must be 0 or more, not {quantum_ms}")
        self._quantum_ns = max(1, round(quantum_ms * 1e6))
        self._service = ServiceTime()
        self._computed: dict[int, int] = {}  # tokens of each request that were ever computed in prefills
        self._held: dict[int, int] = {}  # of those that came back since: computed tokens that it may have lost
        self._back: list[Request] = []  # came back since the last report, which may still charge them

    def rank(self, request: Request) -> float:
        return self._service.of(request) // self._quantum_ns

    def push(self, request: Request, now: int) -> None:
        super().push(request, now)
        if request.first_scheduled_ns is not None:
            self._back.append(request)
            # Now, as it may be on its way again, with a token more, by the time the step that stopped it is reported.
            self._held[request.id] = request.num_tokens - 1

    def remove(self, request: Request) -> None:
        super().remove(request)
        if request.gone:
            self._forget(request)

    def begin(self, draft: Draft, now: int) -> None:
        self._service.begin(draft.view)

    def on_report(self, report: Report) -> None:
        step = report.step
        for request, mode in step.preempted:
            if mode is not Mode.KEEP and request.num_output_tokens and not request.gone:
                self._computed[request.id] = self._held.get(request.id, request.num_tokens - 1)
        duration = self._service.on_report(report)
        for chunk in step.chunks:
            if not chunk.request.gone:
                end, before = chunk.start + chunk.num_tokens, self._computed.get(chunk.request.id, 0)
                new = max(0, end - max(chunk.start, before))
                self._service.take_off(chunk.request, duration - duration * new // chunk.num_tokens)
                self._computed[chunk.request.id] = max(before, end)
        for request, _, _ in report.finished:
            self._forget(request)
        back, self._back = self._back, []
        for request in back:
            self.rerank(request, report.end_ns)

    def _forget(self, request: Request) -> None:
        self._service.forget(request)
        self._computed.pop(request.id, None)
        self._held.pop(request.id, None)
