"""Arrival processes by name, sized by requests or by seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.workloads.generators import arrivals
from experiments.workloads.generators.arrivals import Seconds
from experiments.workloads.generators.streams import stream

Process = Literal["poisson", "gamma", "mmpp-code", "mmpp-conv", "at-once"]

_MMPP = {"mmpp-code": arrivals.AZURE_CODE, "mmpp-conv": arrivals.AZURE_CONV}


@dataclass(frozen=True)
class Size:
    """How much to make: `n` requests, those of `duration_s` seconds, or whichever ends first.

    `rate` is the mean req/s (None: the generator's own).
    """

    n: int | None = None
    duration_s: float | None = None
    rate: float | None = None
    seed: int = 0


def draw_times(process: Process, size: Size, cv: float | None = None) -> Seconds:
    """Arrival times in seconds; the first is 0.

    Raises:
        ValueError: a size, rate or cv that is missing or out of range for this process.
    """
    if process == "at-once":
        if size.n is None:
            raise ValueError("arrivals at-once need n, the number of requests")
        return np.zeros(size.n)
    if process in _MMPP:
        mmpp = _MMPP[process]
        rate = mmpp.mean_rate() if size.rate is None else size.rate
        times, _ = arrivals.until(
            lambda horizon: mmpp.arrivals(horizon, size.seed, size.rate), rate, size.n, size.duration_s
        )
        return times - times[0]
    return _renewal(process, size, cv)


def _renewal(process: Process, size: Size, cv: float | None) -> Seconds:
    if size.rate is None:
        raise ValueError(f"arrivals {process} need a rate (req/s)")
    rate = size.rate
    make: Callable[[int], Seconds]
    if process == "gamma":
        if cv is None:
            raise ValueError("arrivals gamma need a cv (1 is Poisson)")
        shape_cv = cv
        make = lambda n: arrivals.gamma(rate, shape_cv, n, stream(size.seed, "arrivals"))  # noqa: E731
    else:
        make = lambda n: arrivals.poisson(rate, n, stream(size.seed, "arrivals"))  # noqa: E731
    if size.duration_s is None and size.n is not None:
        return make(size.n)
    times, _ = arrivals.until(arrivals.renewal_until(make, rate), rate, size.n, size.duration_s)
    return times
