from __future__ import annotations

from collections.abc import Mapping

from policies import registry
from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "least_progress")
class LeastProgress(RankedVictim):
    """Preempt whoever has come the smallest part of the way: output so far over predicted output.

    Who is nearly done will give its memory back soon by itself. `predictor` as in `sjf`; its history is not fed here,
    so `moving_average` and `quantile` say what the client declared.
    """

    def __init__(
        self,
        predictor: str = "declared",
        mode: str = "recompute",
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(mode)
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> float:
        return -request.num_output_tokens / max(1.0, self._predictor.predict(request))
