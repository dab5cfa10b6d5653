from __future__ import annotations

from collections import deque

from policies.predictors.declared import Declared
from policies.registry import register
from policies.request import Request


@register("predictor", "moving_average")
class MovingAverage:
    """The mean output of the tenant's last `window` finished requests; before the first, what the client declared.

    Never above the request's cap. O(1).
    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, VTC with length prediction (the last 5
    requests of a client).
    """

    def __init__(self, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._window = window
        self._declared = Declared()
        self._last: dict[str, deque[int]] = {}
        self._sum: dict[str, int] = {}

    def predict(self, request: Request) -> float:
        last = self._last.get(request.tenant)
        if last is None:
            return self._declared.predict(request)
        return min(float(request.max_tokens), max(1.0, self._sum[request.tenant] / len(last)))

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        last = self._last.setdefault(request.tenant, deque())
        last.append(num_output_tokens)
        total = self._sum.get(request.tenant, 0) + num_output_tokens
        self._sum[request.tenant] = total - (last.popleft() if len(last) > self._window else 0)
