"""The search for the highest rate that will do, over anything that can be asked about a rate.

First a bracket: from the first guess on in steps of a factor, of its square, of the fourth power, until one rate will
do and one will not. Then the bracket is closed. Where both ends say by how much they meet or miss their limits, the
next probe is where the line between them, in logarithms, crosses; a little to the side of the end that has not moved,
so that if the line is right the bracket closes from both sides. Where two such probes have not cut the bracket to a
quarter, it is halved: Dekker's idea, in the logarithm of the rate. The same arrivals at every rate, compressed, make
what is asked a function and not a draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from experiments.intervals import Interval, interval

TOLERANCE = 0.01
MOST = 12
FURTHEST = 4
"""Steps outwards before the search gives up: a factor of 2 to the 15th."""


@dataclass(frozen=True)
class Probe:
    """What came of one rate.

    Attributes:
        rate: requests a second.
        loads: of each repeat, the largest share of its limit that an objective took: 1 is just met.
        stable: whether the queue held, as far as can be told.
        worst: which objective that was, for tables.
    """

    rate: float
    loads: tuple[float, ...]
    stable: bool = True
    worst: str = ""

    @property
    def load(self) -> Interval:
        """Of all repeats."""
        return interval(self.loads)

    @property
    def will_do(self) -> bool:
        """Whether every objective is met on average, with a stable queue."""
        return self.stable and self.load.mean <= 1


@dataclass
class Found:
    """What a search has come to.

    Attributes:
        low, high: the highest rate that will do, the lowest that will not; None where there is none.
        probes: all that were made, in order.
    """

    low: float | None = None
    high: float | None = None
    probes: list[Probe] = field(default_factory=list)

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        if probe.will_do:
            self.low = probe.rate if self.low is None else max(self.low, probe.rate)
        else:
            self.high = probe.rate if self.high is None else min(self.high, probe.rate)

    def at(self, rate: float) -> Probe:
        """The probe of a rate that was asked about."""
        return next(probe for probe in self.probes if probe.rate == rate)

    @property
    def width(self) -> float:
        """Of the bracket, relative to its lower end; infinite while one end is missing, 0 where they crossed."""
        if self.low is None or self.high is None:
            return math.inf
        return max(0.0, self.high / self.low - 1)

    @property
    def confident(self) -> tuple[float | None, float | None]:
        """Where the upper and the lower bound of the repeats' confidence interval cross the limit: the capacity is
        between. Interpolated between probes; None where they do not cross, or with one repeat."""
        return self._crossing(1), self._crossing(-1)

    def _crossing(self, sign: int) -> float | None:
        points = []
        for probe in sorted(self.probes, key=lambda probe: probe.rate):
            load = probe.load
            if load.half is None:
                return None
            points.append((math.log(probe.rate), _log(load.mean + sign * load.half, probe.stable)))
        for (x, y), (to_x, to_y) in pairwise(points):
            if y <= 0 < to_y:
                return math.exp(x + (to_x - x) * (0 - y) / (to_y - y))
        return None


def find(
    ask: Callable[[float], Probe],
    start: float,
    *,
    tolerance: float = TOLERANCE,
    most: int = MOST,
    factor: float = 2.0,
) -> Found:
    """The highest rate that will do, to within `tolerance`, in at most `most` probes.

    Ends early without a bracket where `FURTHEST` steps outwards have not found its other end.
    """
    found = Found()
    found.add(ask(rounded(start)))
    step = factor
    for _ in range(FURTHEST):
        if len(found.probes) == most or found.width < math.inf:
            break
        rate = found.high / step if found.low is None and found.high is not None else (found.low or start) * step
        found.add(ask(rounded(rate)))
        step *= step
    widths: list[float] = []
    while tolerance < found.width < math.inf and len(found.probes) < most:
        widths.append(math.log1p(found.width))
        rate = rounded(_next(found, tolerance, slow=len(widths) > 2 and widths[-1] > widths[-3] / 4))
        if any(probe.rate == rate for probe in found.probes):
            break  # as close as rates are told apart
        found.add(ask(rate))
    return found


def _next(found: Found, tolerance: float, slow: bool) -> float:
    assert found.low is not None
    assert found.high is not None
    low, high = math.log(found.low), math.log(found.high)
    below, above = found.at(found.low), found.at(found.high)
    y, to_y = _log(below.load.mean, below.stable), _log(above.load.mean, above.stable)
    if slow or not (above.stable and y < to_y):
        return math.exp((low + high) / 2)
    crossing = low + (high - low) * (0 - y) / (to_y - y)
    aside = 0.45 * math.log1p(tolerance)
    crossing += aside if found.probes[-1].will_do else -aside
    margin = min(aside, (high - low) / 4)
    return math.exp(min(max(crossing, low + margin), high - margin))


def _log(load: float, stable: bool) -> float:
    """Of a load, kept within what a line can be drawn through; of an unstable queue above the limit."""
    bounded = math.log(min(max(load, 1e-3), 1e3))
    return bounded if stable else max(bounded, 1e-3)


def rounded(rate: float) -> float:
    """To six digits: what is printed is what was run."""
    return float(f"{rate:.6g}")


def summary_line(found: Found, limits: Sequence[str]) -> str:
    """The answer in one line."""
    asked = ", ".join(limits) or "a stable queue"
    count = f"{len(found.probes)} probes"
    if found.low is None:
        return f"no rate was found that meets {asked}: even {found.high:g} requests/s misses ({count})"
    if found.high is None:
        return f"{found.low:g} requests/s meets {asked}, and no rate was found that does not ({count})"
    text = f"capacity {found.low:g} requests/s for {asked}; {found.high:g} is too many ({count})"
    low, high = found.confident
    if low is not None or high is not None:
        repeats = len(found.probes[0].loads)
        ends = (f"{end:.4g}" if end is not None else "?" for end in (low, high))
        text += f"; 95% over {repeats} seeds: {' to '.join(ends)}"
    return text
