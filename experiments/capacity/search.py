"""The search for the highest rate that will do, over anything that can be asked about a rate.

First a bracket: from the first guess on in steps of a factor, of its square, of the fourth power, until one rate will
do and one will not. Then the bracket is closed: the next probe is where the load would pass its limit, by the line
between both ends; of limit / load over the rate, which is nearly straight where a delay goes with the inverse of the
capacity that is left, and of both in logarithms, for a power of the rate; the lower one of the two, which is what an
overload takes less time for. A little to the side of the end that has not moved, so that if the line is right the
bracket closes from both sides; an end that has stayed counts for half each time (the Illinois method). Where two such
probes have not halved the bracket, it is halved. The same seeds at every rate make what is asked a function of it.

A queue that grows tells what the server can bear: what arrives less the growth. The capacity may be just below, so the
next probe is; if that will do, one just above. An overload far beyond the capacity so costs two probes, not six. From a
guess within a factor of 16 the answer is within 1% after at most 12.
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
        served: where the queue grew, what the server could bear, requests a second.
    """

    rate: float
    loads: tuple[float, ...]
    stable: bool = True
    worst: str = ""
    served: float | None = None

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
        if found.low is None and found.high is not None:
            rate = _near_served(found, tolerance) or found.high / step
        else:
            rate = (found.low or start) * step
        found.add(ask(rounded(rate)))
        step *= step
    widths: list[float] = []
    while tolerance < found.width < math.inf and len(found.probes) < most:
        widths.append(math.log1p(found.width))
        slow = len(widths) > 2 and widths[-1] > widths[-3] / 2
        rate = rounded(_near_served(found, tolerance) or _next(found, tolerance, slow))
        if any(probe.rate == rate for probe in found.probes):
            break  # as close as rates are told apart
        found.add(ask(rate))
    return found


def _near_served(found: Found, tolerance: float) -> float | None:
    """A little below what an overloaded server could bear; where that is known to do, a little above, and more. None
    where the bracket is about as close already."""
    assert found.high is not None
    served = found.at(found.high).served
    if served is None:
        return None
    for aside in (-1, 1, 4, 16):
        rate = served * (1 + aside * tolerance)
        if (found.low or 0.0) * (1 + tolerance / 2) < rate < found.high / (1 + 4 * tolerance):
            return rate
    return None


def _next(found: Found, tolerance: float, slow: bool) -> float:
    assert found.low is not None
    assert found.high is not None
    low, high = found.low, found.high
    below, above = found.at(low), found.at(high)
    middle = math.sqrt(low * high)
    if slow or not above.stable:
        return middle
    last = [probe.will_do for probe in reversed(found.probes)]
    again = next((i for i, will_do in enumerate(last) if will_do != last[0]), len(last)) - 1
    share, other = (1.0, 2.0**-again) if last[0] else (2.0**-again, 1.0)  # an end that has stayed counts for half
    room, lack = share * _room(below), -other * _room(above)
    straight = low + (high - low) * room / (room + lack)
    room, lack = -share * _log(below.load.mean, True), other * _log(above.load.mean, True)
    power = low * (high / low) ** (room / (room + lack)) if room + lack else middle
    crossing = min(straight, power)
    aside = 0.45 * tolerance * crossing
    crossing += aside if last[0] else -aside
    margin = min(aside, (high - low) / 4)
    return min(max(crossing, low + margin), high - margin)


def _room(probe: Probe) -> float:
    """Limit / load - 1; of a load that is far below its limit no more than a line can be drawn through."""
    return 1 / max(probe.load.mean, 0.25) - 1


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
