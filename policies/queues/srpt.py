from __future__ import annotations

from collections.abc import Mapping

from policies.plan import Report
from policies.queues.sjf import Sjf
from policies.registry import register
from policies.request import Request


@register("queue", "srpt")
class Srpt(Sjf):
    """Shortest predicted remaining output first; with limit=0.8 TRAIL's limited preemption.

    Rank = max(0, prediction - output tokens so far), in tokens. Under `preemptive` a running request may be stopped
    only while output tokens < `limit` x prediction: 1 is SRPT, 0.8 TRAIL, 0 never stops anybody. Under other schedulers
    it is SJF in which a preempted request counts with what it has left. `predictor` as in `sjf`; the first prediction
    of a request is kept.
    Where this departs: TRAIL refines the prediction with each token from the model's own embeddings, which no predictor
    here sees; it is the first prediction, less what came since. Its memory is got back by recompute, as in the paper,
    or left to it (`preemptive,mode=keep`). The prompt does not count. O(log n) an arrival.
    Source: Shahout et al., "Don't Stop Me Now: Embedding Based Scheduling for LLMs" (TRAIL), ICLR 2025, arXiv
    2410.01035.
    """

    def __init__(
        self,
        predictor: str = "declared",
        limit: float = 1.0,
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(predictor, oracle, seed)
        if not 0 <= limit <= 1:
            raise ValueError(f"limit must be between 0 and 1, not {limit}")
        self._limit = limit
        self._predicted: dict[int, float] = {}

    def rank(self, request: Request) -> float:
        return max(0.0, self._prediction(request) - request.num_output_tokens)

    def preemptible(self, request: Request) -> bool:
        return request.num_output_tokens < self._limit * self._prediction(request)

    def remove(self, request: Request) -> None:
        super().remove(request)
        if request.gone:
            self._predicted.pop(request.id, None)

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        for request, _, _ in report.finished:
            self._predicted.pop(request.id, None)

    def _prediction(self, request: Request) -> float:
        predicted = self._predicted.get(request.id)
        if predicted is None:
            predicted = self._predicted[request.id] = self._predictor.predict(request)
        return predicted
