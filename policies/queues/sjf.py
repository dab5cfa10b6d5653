from __future__ import annotations

from collections.abc import Mapping

from policies import registry
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.registry import register
from policies.request import Request


@register("queue", "sjf")
class Sjf(KeyQueue):
    """Shortest predicted output first, not preemptive.

    `predictor=declared` goes by the length that clients declare (their cap where they declare none);
    `predictor=oracle` by the true length, which makes the policy clairvoyant. `diptych policies` lists the others.
    A prediction is made when a request starts to wait. O(log n) an arrival.
    """

    def __init__(self, predictor: str = "declared", oracle: Mapping[int, int] | None = None, seed: int = 0) -> None:
        super().__init__()
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)

    def rank(self, request: Request) -> float:
        return self._predictor.predict(request)

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)
