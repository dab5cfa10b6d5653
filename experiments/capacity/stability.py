"""Whether a queue held: from when requests came and went, so for any run, also one that a client measured.

Of a queue that is too slow, the number in the system grows by as much as more arrives than leaves. The window's
arrivals are cut into batches; a line through the batches' mean numbers in the system, over time, has a slope and a
standard error. Unstable is a run whose slope is above 0 at 95% confidence, by more than a share of the rate of arrivals
(an excess that the search tells apart), and that grows by more than chance alone would have it in a system without any
queue, whose number is Poisson's: three standard deviations. So instability is shown, stability is not: a run may be too
short to show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.intervals import t_quantile
from experiments.records import Run
from experiments.sweeps.measuring import bounds
from experiments.sweeps.spec import Window

BATCHES = 10
LEVEL = 0.95
CHANCE = 3.0


@dataclass(frozen=True, slots=True)
class Drift:
    """How fast the number in the system grew: a share of the rate of arrivals, and its one-sided lower bound; and what
    is left of the rate, which the server could bear. `growth`: in the number, in standard deviations."""

    share: float
    least: float
    served: float
    growth: float

    def stable(self, tolerance: float) -> bool:
        """Whether no growth of more than this share of the arrivals has been shown."""
        return not (self.least > 0 and self.share > tolerance and self.growth > CHANCE)


def drift(run: Run, window: Window) -> Drift:
    """Of a run's window; none where it has too few arrivals, or no time between them."""
    requests = run.requests
    return drift_of(
        requests["arrival_ns"].to_numpy(np.int64), requests["finish_ns"].dropna().to_numpy(np.int64), window
    )


def drift_of(arrivals: NDArray[np.int64], ends: NDArray[np.int64], window: Window) -> Drift:
    """Of arrivals and ends in nanoseconds, in any order."""
    arrivals, ends = np.sort(arrivals), np.sort(ends)
    first, last = bounds(len(arrivals), window)
    kept = arrivals[first:last]
    if len(kept) < 2 * BATCHES or kept[-1] <= kept[0]:
        return Drift(0.0, 0.0, 0.0, 0.0)
    present = np.arange(first, last) + 1 - np.searchsorted(ends, kept, side="right")
    seconds = (kept - kept[0]) / 1e9
    means = [(part.mean(), at.mean()) for part, at in zip(_cut(present), _cut(seconds), strict=True)]
    number, time = np.array(means).T
    away = time - time.mean()
    slope = float(away @ number / (away @ away))
    rest = number - number.mean() - slope * away
    error = float(np.sqrt(rest @ rest / (BATCHES - 2) / (away @ away)))
    rate = (len(kept) - 1) / seconds[-1]
    least = slope - t_quantile(BATCHES - 2, LEVEL) * error
    growth = slope * float(seconds[-1]) / float(np.sqrt(1 + number.mean()))
    return Drift(slope / rate, least / rate, rate - slope, growth)


def _cut(values: NDArray[Any]) -> list[NDArray[np.float64]]:
    return np.array_split(values.astype(np.float64), BATCHES)
