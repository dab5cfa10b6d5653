from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from policies import registry
from policies.alarms import Alarms
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.registry import register
from policies.request import Request

MOST_PROMOTIONS = 64
"""In one plan, the others in the next ones: many that came at once are promoted at once, which takes its time."""


@dataclass(slots=True)
class Place:
    """A live request's. Steps are counted as they are reported."""

    score: float
    promoted: bool = False
    left: int = 0  # steps that it may still run while promoted
    waits_since: int | None = None  # step
    runs_since: int = 0  # step
    outputs: int = 0  # tokens that it had when it was started last


@register("queue", "ltr")
class Ltr(KeyQueue):
    """Learning to rank: by a score that predicts who is shorter, with a guard against starvation; for `preemptive`.

    Each request is scored once, when it comes; rank = (not promoted, score), the smaller first, ties by arrival. Only
    the order of the scores counts. Who has not run for `threshold` (200) steps in a row is promoted, ahead of all who
    are not, until it has run for `quantum` (10) steps; `threshold=0` promotes nobody. These are the paper's starvation
    threshold and priority quantum; it gives them no values, and the defaults are those of its code's fairness runs.
    `predictor` stands for the learned ranker, its prediction in tokens for the score: `noisy_oracle/error=...` is one
    of a set quality, `oracle` a perfect one, and with that and nobody promoted this is `sjf,predictor=oracle`.

    Where this departs: the paper orders waiting and running requests anew in every step and swaps out those that are
    not chosen. Under `preemptive` a running one is stopped for one ahead of it, is paused or computed again as that
    says, and not before it has got a token, as else two could stop each other for ever; a running request counts as
    one that runs even where a step has no token for it. Under other schedulers nobody is stopped: promoted requests
    are the next to be admitted. Steps are counted when their reports come, so that with `lag=1` a count is one late.
    Of those that are to be promoted 64 are in one plan, the first to come first, the others in the next ones. Where all
    wait for longer than `threshold` all are promoted, and take turns of `quantum` steps: it should be above that.
    O(log n) an arrival, a start, a stop or a promotion.
    Source: Fu et al., "Efficient LLM Scheduling by Learning to Rank", NeurIPS 2024, arXiv 2408.15792, algorithm 1.
    """

    def __init__(
        self,
        predictor: str = "declared",
        threshold: int = 200,
        quantum: int = 10,
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if threshold < 0 or quantum < 1:
            raise ValueError("threshold must be 0 (nobody is promoted) or more, quantum at least 1")
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self._threshold = threshold
        self._quantum = quantum
        self._places: dict[int, Place] = {}
        self._steps = 0
        self._starved = Alarms()  # by steps: when a waiting request is to be promoted
        self._spent = Alarms()  # when a running one is to be promoted no longer

    def rank(self, request: Request) -> tuple[float, ...]:
        place = self._places.get(request.id) or self._place(request)
        return (not place.promoted, place.score)

    def preemptible(self, request: Request) -> bool:
        return request.num_output_tokens > self._place(request).outputs

    def _place(self, request: Request) -> Place:
        place = self._places.get(request.id)
        if place is None:
            score = self._predictor.predict(request)
            place = self._places[request.id] = Place(score, outputs=request.num_output_tokens)
        return place

    def push(self, request: Request, now: int) -> None:
        place = self._place(request)
        if place.waits_since is None:
            place.waits_since = self._steps
            self._spent.cancel(request)
            if place.promoted:
                place.left -= self._steps - place.runs_since
        if self._threshold and not (place.promoted and place.left == self._quantum):
            self._starved.set(request, place.waits_since + self._threshold)
        super().push(request, now)

    def pop(self, now: int) -> Request:
        request = super().pop(now)
        place = self._place(request)
        place.waits_since, place.runs_since, place.outputs = None, self._steps, request.num_output_tokens
        self._starved.cancel(request)
        if place.promoted:
            self._spent.set(request, self._steps + place.left)
        return request

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._starved.cancel(request)
        if request.gone:
            self._forget(request)

    def begin(self, draft: Draft, now: int) -> None:
        for request in self._spent.due(self._steps):
            self._places[request.id].promoted = False
        for request in islice(self._starved.due(self._steps), MOST_PROMOTIONS):
            place = self._places[request.id]
            place.promoted, place.left, place.waits_since = True, self._quantum, self._steps
            self.rerank(request, now)

    def on_report(self, report: Report) -> None:
        self._steps += 1
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._places.pop(request.id, None)
        self._starved.cancel(request)
        self._spent.cancel(request)
