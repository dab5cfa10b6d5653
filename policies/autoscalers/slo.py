from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from policies.autoscaling import Bounds, in_ns
from policies.contract import Replica
from policies.registry import register
from policies.request import Request, State


@register("autoscaler", "slo")
class SloAttainment:
    """More replicas while too many first tokens come late, one fewer once all have been in time for long.

    Of the requests that ended in the last `window_s` (60 s), the share whose first token came within its objective
    (`Slo.ttft_ns`, else `ttft_ms`, 1000) is compared with `target` (0.95). Below it the pool grows by `step` of its
    size (0.5, at least one), unless a replica starts already. At `high` (0.99) or above for `cooldown_s` (120 s) it
    shrinks by one. In between nothing changes. Once other replicas serve than before, all is measured anew.

    A request that ended without a first token has missed it, unless it was refused. `least` (1) and `most` (8)
    replicas; `every_s` 15 s. Ours; it stands for the many that scale on measured latency. Unlike `target_load` it
    reacts only once requests end, and finds the smallest size that does by trying one that does not. O(1) a request;
    memory: those that ended within a window.
    """

    def __init__(
        self,
        ttft_ms: float = 1000.0,
        target: float = 0.95,
        high: float = 0.99,
        least: int = 1,
        most: int = 8,
        step: float = 0.5,
        every_s: float = 15.0,
        window_s: float = 60.0,
        cooldown_s: float = 120.0,
    ) -> None:
        if ttft_ms <= 0 or step <= 0 or cooldown_s < 0:
            raise ValueError(
                f"ttft_ms and step must be above 0 and cooldown_s at least 0, not {ttft_ms}, {step} and {cooldown_s}"
            )
        if not 0 < target <= high <= 1:
            raise ValueError(f"target must be above 0, at most high, and that at most 1, not {target} and {high}")
        self.every_ns = in_ns("every_s", every_s)
        self._window_ns = in_ns("window_s", window_s)
        self._ttft_ns = round(1e6 * ttft_ms)
        self._target = target
        self._high = high
        self._bounds = Bounds(least, most)
        self._step = step
        self._cooldown_ns = round(1e9 * cooldown_s)
        self._ended: deque[tuple[int, bool]] = deque()  # (when, whether in time)
        self._num_in_time = 0
        self._good_since: int | None = None
        self._serving: tuple[int, ...] = ()

    def scale(self, replicas: Sequence[Replica], num_starting: int, now: int) -> int:
        serving = tuple(replica.id for replica in replicas)
        if serving != self._serving:
            self._serving, self._good_since, self._num_in_time = serving, None, 0
            self._ended.clear()
        self._forget(now - self._window_ns)
        current = len(replicas) + num_starting
        if not self._ended:
            return self._bounds.clip(current)
        attained = self._num_in_time / len(self._ended)
        if attained < self._high:
            self._good_since = None
            grow = attained < self._target and not num_starting
            return self._bounds.clip(current + (max(1, math.ceil(self._step * current)) if grow else 0))
        if self._good_since is None:
            self._good_since = now
        if num_starting or now - self._good_since < self._cooldown_ns:
            return self._bounds.clip(current)
        return self._bounds.clip(current - 1)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        if request.state is State.REFUSED:
            return
        limit_ns = self._ttft_ns if request.slo is None or request.slo.ttft_ns is None else request.slo.ttft_ns
        first = request.first_token_ns
        in_time = first is not None and first - request.arrival_ns <= limit_ns
        self._ended.append((now, in_time))
        self._num_in_time += in_time

    def _forget(self, before: int) -> None:
        while self._ended and self._ended[0][0] < before:
            self._num_in_time -= self._ended.popleft()[1]
