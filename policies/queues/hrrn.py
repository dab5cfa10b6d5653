from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from policies import registry
from policies.draft import Draft
from policies.key_queue import first_of
from policies.plan import Report
from policies.queues.fcfs import Fcfs
from policies.registry import register
from policies.request import Request


@register("queue", "hrrn")
class Hrrn:
    """Highest response ratio next: shortest first, but whoever waits gains on the others by its own length.

    Response ratio = (waited + service) / service; the highest goes first, and of equal ones the first to arrive. It
    grows with time, the faster the shorter a request is, so that a long one is passed only by those that came soon
    enough after it: of services s < S, the short one goes first only if it comes within (1 - s/S) of what the long one
    has waited by then. Nobody starves, and nobody is stopped for another.
    Waited = now - arrival, in nanoseconds, over all of a request's life. Service = predicted output tokens +
    `prompt_weight` (0) x prompt tokens, rounded to whole tokens, at least 1: a prompt token counts like so many output
    tokens. What a token takes need not be known, as the order is that of waited / service. `predictor` as in `sjf`; a
    prediction is made when a request starts to wait.

    SGLang's policy of this name has no clock: its ratio is (prefill tokens processed since arrival) / (prompt tokens
    that are not cached). Here it is the classic.
    Ranks change with time, each at its own rate, so that no heap stays in order. But requests of one service keep
    theirs, by arrival: only the first one of each is looked at. The ratios of those are an array, made anew at another
    `now`: O(log n) an arrival, O(services) vectorised a step that looks at the queue and an admission. With whole
    tokens there are a few thousand services at most, whatever waits: some 20 us an admission; were all of 100,000
    different, 0.3 ms a step and 0.05 ms an admission.
    Source: Brinch Hansen, "An analysis of response ratio scheduling", IFIP Congress 1971.
    """

    def __init__(
        self,
        predictor: str = "declared",
        prompt_weight: float = 0.0,
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        if prompt_weight < 0:
            raise ValueError(f"prompt_weight must be 0 or more, not {prompt_weight}")
        self._prompt_weight = prompt_weight
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self._service: dict[int, int] = {}  # of those that wait
        self._lines: list[Fcfs] = []  # those of one service each; not empty
        self._place: dict[int, int] = {}  # service -> its index in these and the columns
        self._services = np.ones(64)
        self._arrivals = np.zeros(64, dtype=np.int64)  # of the first of each
        self._ids = np.zeros(64, dtype=np.int64)
        self._ratios = np.zeros(64)
        self._as_of: int | None = None  # when these were right
        self._best: Request | None = None  # then, if nobody has come or gone since

    def push(self, request: Request, now: int) -> None:
        if request.id in self._service:
            return
        predicted = self._predictor.predict(request)
        service = max(1, round(predicted + self._prompt_weight * request.num_prompt_tokens))
        self._service[request.id] = service
        if service not in self._place:
            self._add_line(service)
        place = self._place[service]
        self._lines[place].push(request, now)
        self._look_at_first(place)

    def peek(self, now: int) -> Request | None:
        if self._lines and (self._best is None or self._as_of != now):
            self._best = self._find_best(now)
        return self._best

    def _find_best(self, now: int) -> Request | None:
        count = len(self._lines)
        ratios = self._ratios[:count]
        if self._as_of != now:
            np.divide(now - self._arrivals[:count], self._services[:count], out=ratios)
            self._as_of = now
        best = int(ratios.argmax())
        equal = ratios == ratios[best]
        if np.count_nonzero(equal) > 1:
            places = np.flatnonzero(equal)
            arrivals = self._arrivals[places]
            places = places[arrivals == arrivals.min()]
            best = int(places[self._ids[places].argmin()])
        return self._lines[best].peek(now)

    def pop(self, now: int) -> Request:
        request = first_of(self, now)
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        service = self._service.pop(request.id, None)
        if service is not None:
            place = self._place[service]
            self._lines[place].remove(request)
            self._look_at_first(place)

    def begin(self, draft: Draft, now: int) -> None:
        """Nothing about the replica changes the order."""

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)

    def _add_line(self, service: int) -> None:
        place = len(self._lines)
        if place == len(self._ratios):
            self._services, self._arrivals, self._ids, self._ratios = (
                np.concatenate([column, column]) for column in self._columns()
            )
        self._lines.append(Fcfs())
        self._place[service] = place
        self._services[place] = service

    def _look_at_first(self, place: int) -> None:
        """Another one may be the first of its service, or nobody is."""
        self._best = None
        first = self._lines[place].peek(0)
        if first is None:
            self._drop_line(place)
            return
        self._arrivals[place], self._ids[place] = first.key
        if self._as_of is not None:
            self._ratios[place] = (self._as_of - first.arrival_ns) / self._services[place]

    def _drop_line(self, place: int) -> None:
        """Put the last line in its place."""
        del self._place[int(self._services[place])]
        last = self._lines.pop()
        end = len(self._lines)
        if place < end:
            self._lines[place] = last
            for column in self._columns():
                column[place] = column[end]
            self._place[int(self._services[place])] = place

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self._services, self._arrivals, self._ids, self._ratios
