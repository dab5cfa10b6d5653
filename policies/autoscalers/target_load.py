from __future__ import annotations

import math
from collections.abc import Sequence

from policies.autoscaling import Bounds, Stabilised, in_ns
from policies.contract import Replica
from policies.registry import register
from policies.request import Request


@register("autoscaler", "target_load")
class TargetLoad:
    """Kubernetes' formula on requests a replica: so many replicas that each has `target` waiting and running ones.

    The Horizontal Pod Autoscaler's algorithm (Kubernetes documentation, "Horizontal Pod Autoscaling"), with the mean of
    waiting and running requests a replica for its metric:

        desired = ceil(current * metric / target)

    and no change while |metric / target - 1| <= `tolerance` (0.1). Replicas that start count as having no requests, as
    the HPA has it for pods that are not ready, so what has been asked for is not asked for twice. On the way down the
    highest desired size of the last `window_s` (300 s) counts, on the way up the last one (0 s), as by default there.

    Knobs: `target` requests a replica (16); `least` (1) and `most` (8) replicas; `every_s` (15 s, the HPA's period);
    `tolerance`; `window_s`. Not taken over: limits on the speed of scaling (by default twice as many or 4 more within
    15 s), and that a metric which is missing counts for the worse.

    Requests that wait while no replica serves are not seen. O(replicas) each time; memory: recommendations of a window.
    """

    def __init__(
        self,
        target: float = 16.0,
        least: int = 1,
        most: int = 8,
        every_s: float = 15.0,
        tolerance: float = 0.1,
        window_s: float = 300.0,
    ) -> None:
        if target <= 0:
            raise ValueError(f"target must be above 0, not {target}")
        if tolerance < 0 or window_s < 0:
            raise ValueError(f"tolerance and window_s must be at least 0, not {tolerance} and {window_s}")
        self.every_ns = in_ns("every_s", every_s)
        self._target = target
        self._bounds = Bounds(least, most)
        self._tolerance = tolerance
        self._down = Stabilised(round(1e9 * window_s))

    def scale(self, replicas: Sequence[Replica], num_starting: int, now: int) -> int:
        current = len(replicas) + num_starting
        load = sum(replica.num_waiting + replica.num_running for replica in replicas)
        right = current * self._target
        desired = current if abs(load - right) <= self._tolerance * right else math.ceil(load / self._target)
        return self._bounds.clip(max(desired, min(current, self._down.of(self._bounds.clip(desired), now))))

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """The load is read from the replicas."""
