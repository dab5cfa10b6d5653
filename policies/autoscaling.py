"""What autoscalers share: the bounds of a pool's size, and the highest recommendation of a time."""

from __future__ import annotations

from collections import deque


def in_ns(name: str, seconds: float) -> int:
    """A knob in seconds as whole nanoseconds. Raises ValueError for less than one."""
    if seconds < 1e-9:
        raise ValueError(f"{name} must be at least a nanosecond, not {seconds}")
    return round(1e9 * seconds)


class Bounds:
    """A pool has at least `least` replicas, and at most `most`. Raises ValueError for bounds that are none."""

    def __init__(self, least: int, most: int) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"least must be at least 1 and most no less than that, not {least} and {most}")
        self.least = least
        self.most = most

    def clip(self, count: int) -> int:
        return min(max(count, self.least), self.most)


class Stabilised:
    """The highest recommendation of the last `window_ns`: a pool shrinks only by what nobody has wanted since. O(1) a
    recommendation in the mean; memory: those of a window, where each is above all that follow."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._highest: deque[tuple[int, int]] = deque()  # (time, recommendation), falling

    def of(self, recommendation: int, now: int) -> int:
        while self._highest and self._highest[-1][1] <= recommendation:
            self._highest.pop()
        self._highest.append((now, recommendation))
        while self._highest[0][0] < now - self._window_ns:
            self._highest.popleft()
        return self._highest[0][1]
