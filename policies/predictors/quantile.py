from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

from policies.predictors.declared import Declared
from policies.registry import register
from policies.request import Request


@register("predictor", "quantile")
class Quantile:
    """A quantile of the last `window` output lengths of all requests, among those above what is generated already.

    `q` is the quantile (0.5: the median). Before the first end, and where nobody in the window got further than this
    request, what the client declared; never above its cap. O(window) an end, O(log window) a prediction.
    Source: the history of Past-Future (Gong et al., ASPLOS 2025), whose scheduler draws from it instead.
    """

    def __init__(self, q: float = 0.5, window: int = 200) -> None:
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be between 0 and 1, not {q}")
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._q = q
        self._window = window
        self._declared = Declared()
        self._order: deque[int] = deque()
        self._sorted: list[int] = []

    def predict(self, request: Request) -> float:
        lengths = self._sorted
        beyond = bisect_right(lengths, request.num_output_tokens)
        if beyond == len(lengths):
            return self._declared.predict(request)
        index = beyond + round(self._q * (len(lengths) - 1 - beyond))
        return min(float(request.max_tokens), float(lengths[index]))

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        self._order.append(num_output_tokens)
        insort(self._sorted, num_output_tokens)
        if len(self._order) > self._window:
            self._sorted.pop(bisect_right(self._sorted, self._order.popleft()) - 1)
