from __future__ import annotations

from policies.queues.sjf import Sjf
from policies.registry import register
from policies.request import Request


@register("queue", "ljf")
class Ljf(Sjf):
    """Longest predicted output first: the control for size-based policies, the worst order for the mean.

    `predictor` as in `sjf`. Under `preemptive` a running request keeps the place of its whole length, not of what is
    left. O(log n) an arrival.
    """

    def rank(self, request: Request) -> float:
        return -super().rank(request)
