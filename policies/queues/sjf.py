from __future__ import annotations

from collections.abc import Mapping

from policies.key_queue import KeyQueue
from policies.predictors import make_predictor
from policies.registry import register
from policies.request import Request


@register("queue", "sjf")
class Sjf(KeyQueue):
    """Shortest predicted output first, not preemptive.

    `predictor=declared` goes by the length that clients declare (their cap where they declare none);
    `predictor=oracle` by the true length, which makes the policy clairvoyant.
    """

    def __init__(self, predictor: str = "declared", oracle: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self._predictor = make_predictor(predictor, oracle)
        self.clairvoyant = self._predictor.clairvoyant

    def rank(self, request: Request) -> float:
        return self._predictor.predict(request)
