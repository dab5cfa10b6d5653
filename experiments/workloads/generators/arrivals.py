"""Arrival processes: Poisson, Gamma renewal, Markov-modulated Poisson (MMPP), and many bursty clients at
once.

All return arrival times in seconds, sorted. Take `n` requests or a duration with `until`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.workloads.generators.streams import stream

Seconds = NDArray[np.float64]

LONGEST_S = 9e9
"""Nanoseconds from the start are kept in 64 bits."""
LONGEST_MMPP_S = 10_000_000
"""An MMPP is walked second by second."""


def to_ns(seconds: Seconds) -> NDArray[np.int64]:
    """Seconds as whole nanoseconds. Raises ValueError for what does not fit into 64 bits: 285 years."""
    last = float(np.max(seconds, initial=0.0))
    if last > LONGEST_S:
        raise ValueError(f"the last request would arrive after {last:.3g} s; ask for fewer or for a higher rate")
    return np.rint(np.asarray(seconds, np.float64) * 1e9).astype(np.int64)


def _check(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def poisson(rate: float, n: int, rng: np.random.Generator) -> Seconds:
    """`n` arrivals with exponential gaps, `rate` req/s, the first at 0.

    Raises:
        ValueError: a rate that is not positive and finite.
    """
    _check("rate", rate)
    return _from_gaps(rng.exponential(1 / rate, max(n - 1, 0)), n)


def gamma(rate: float, cv: float, n: int, rng: np.random.Generator) -> Seconds:
    """`n` arrivals with Gamma gaps: shape 1/cv^2, scale cv^2/rate (as DistServe and vLLM's burstiness do).

    Raises:
        ValueError: a rate or cv that is not positive and finite.
    """
    _check("rate", rate)
    _check("cv", cv)
    return _from_gaps(rng.gamma(1 / cv**2, cv**2 / rate, max(n - 1, 0)), n)


def _from_gaps(gaps: Seconds, n: int) -> Seconds:
    return np.concatenate([[0.0], np.cumsum(gaps)])[:n]


@dataclass(frozen=True)
class Mmpp:
    """A Markov-modulated Poisson process that may change state once a second.

    Attributes:
        rates: req/s in each state.
        transition: [state, next state] probabilities of one 1 s step.
    """

    rates: tuple[float, ...]
    transition: tuple[tuple[float, ...], ...]

    def stationary(self) -> Seconds:
        """Long-run share of time in each state."""
        matrix = self._matrix()
        size = len(self.rates)
        equations = np.vstack([matrix.T - np.eye(size), np.ones(size)])
        shares, *_ = np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)
        return np.clip(shares, 0, None) / np.clip(shares, 0, None).sum()

    def mean_rate(self) -> float:
        """Long-run req/s."""
        return float(self.stationary() @ np.array(self.rates))

    def _matrix(self) -> Seconds:
        matrix = np.array(self.transition, np.float64)
        return matrix / matrix.sum(axis=1, keepdims=True)  # published rows are rounded to four digits

    def arrivals(self, duration_s: float, seed: int, rate: float | None = None) -> Seconds:
        """Arrivals in [0, duration_s), started in the stationary state.

        `rate` multiplies the rates of all states so that the mean is `rate`: more users, who come and go as
        slowly as before. Compress time instead (`Workload.scale_rate`) to keep the CV of the gaps.
        A longer duration with the same seed begins with the same arrivals.
        """
        _check("duration_s", duration_s)
        _check("rate", 1.0 if rate is None else rate)
        if duration_s > LONGEST_MMPP_S:
            raise ValueError(
                f"arrivals over {duration_s:.3g} s: of an mmpp at most {LONGEST_MMPP_S:,} s are drawn; ask for fewer "
                "requests or a higher rate, or for arrivals: poisson"
            )
        steps = int(np.ceil(duration_s))
        states = self._states(steps, stream(seed, "mmpp states"))
        factor = 1.0 if rate is None else rate / self.mean_rate()
        counts = stream(seed, "mmpp counts").poisson(np.array(self.rates)[states] * factor)
        within = stream(seed, "mmpp within").random(int(counts.sum()))
        times = np.sort(np.repeat(np.arange(steps), counts) + within)
        return times[times < duration_s]

    def _states(self, steps: int, rng: np.random.Generator) -> NDArray[np.intp]:
        # Rounding may leave a last sum of 0.9999...: search only the inner bounds.
        bounds = [row[:-1].tolist() for row in np.cumsum(self._matrix(), axis=1)]
        start = np.cumsum(self.stationary())[:-1]
        draws = rng.random(steps)
        states = np.empty(steps, np.intp)
        state = int(np.searchsorted(start, draws[0], side="right"))
        for step, draw in enumerate(draws.tolist()):
            if step:
                state = sum(draw >= bound for bound in bounds[state])
            states[step] = state
        return states


#: Fitted to 1 s counts of the Azure 2023 code trace: CV 11.8 (trace 13.2), IDC at 1/10/60 s 12/65/140
#: (13/72/164).
AZURE_CODE = Mmpp(
    rates=(0.0, 0.281, 7.099, 22.746),
    transition=(
        (0.9738, 0.0053, 0.0202, 0.0006),
        (0.1171, 0.4234, 0.4347, 0.0248),
        (0.0554, 0.0987, 0.7739, 0.072),
        (0.0279, 0.0431, 0.2849, 0.6441),
    ),
)
#: Fitted to 1 s counts of the Azure 2023 conversation trace: CV 1.06 (trace 1.09), IDC 1.3/3.5/12
#: (1.4/3.9/16).
AZURE_CONV = Mmpp(
    rates=(2.112, 4.83, 7.154),
    transition=((0.9436, 0.0564, 0.0), (0.0026, 0.9901, 0.0073), (0.0, 0.0137, 0.9863)),
)


@dataclass(frozen=True)
class Clients:
    """Many clients, each a Gamma renewal process, at once: ServeGen's picture of a cloud service.

    Client k of `count` has a rate proportional to (k + 1)^-1.04 and a CV drawn from lognormal(ln 2.2, 0.9),
    clipped to [0.8, 15] (fitted to ServeGen's per-client statistics of deepseek-r1 and m-large). At 13.4 req/s
    for an hour the sum has, by seed, CV 1.3 to 1.7 and IDC at 60 s of 5 to 24 (deepseek-r1: 1.67 and 32).
    """

    count: int = 73
    rank_slope: float = 1.04

    def arrivals(self, duration_s: float, rate: float, seed: int) -> tuple[Seconds, NDArray[np.int64]]:
        """(times, client of each) in [0, duration_s). A longer duration begins with the same arrivals.

        Each client starts in its stationary state: a Gamma(shape + 1) gap is the one that time 0 falls into.
        """
        _check("duration_s", duration_s)
        _check("rate", rate)
        weights = np.arange(1, self.count + 1) ** -self.rank_slope
        rates = rate * weights / weights.sum()
        cvs = np.clip(stream(seed, "client cv").lognormal(np.log(2.2), 0.9, self.count), 0.8, 15)
        times = [self._client(duration_s, rates[k], cvs[k], seed, k) for k in range(self.count)]
        client = np.repeat(np.arange(self.count), [len(own) for own in times])
        merged = np.concatenate(times)
        order = np.argsort(merged, kind="stable")
        return merged[order], client[order]

    @staticmethod
    def _client(duration_s: float, rate: float, cv: float, seed: int, k: int) -> Seconds:
        rng = stream(seed, "client gaps", k)
        shape, scale = 1 / cv**2, cv**2 / rate
        now = rng.random() * rng.gamma(shape + 1, scale)
        times: list[Seconds] = []
        while now < duration_s:
            own = now + np.concatenate([[0.0], np.cumsum(rng.gamma(shape, scale, 256))])
            times.append(own[:-1])
            now = float(own[-1])
        every = np.concatenate(times) if times else np.empty(0)
        return every[every < duration_s]


def until(
    make: Callable[[float], Seconds], mean_rate: float, n: int | None, duration_s: float | None
) -> tuple[Seconds, float]:
    """(times, horizon): the first `n` arrivals, those within `duration_s`, or whichever ends first.

    `make(horizon)` gives the arrivals in [0, horizon); a longer horizon must begin with the same arrivals.

    Raises:
        ValueError: neither limit is given, or nothing arrives within `duration_s`.
    """
    if n is None and duration_s is None:
        raise ValueError("give n (requests) or duration_s (seconds), or both")
    end = float("inf") if duration_s is None else duration_s
    horizon = end if n is None else min(end, 1.5 * (n + 10) / mean_rate)
    times = make(horizon)
    while n is not None and len(times) < n and horizon < end:
        horizon = min(end, 2 * horizon)
        times = make(horizon)
    if not len(times):
        raise ValueError(f"no request arrives within {duration_s} s at {mean_rate:.4g} req/s; ask for longer")
    return times[:n], horizon


def renewal_until(make: Callable[[int], Seconds], mean_rate: float) -> Callable[[float], Seconds]:
    """For `until`: turns `make(n)`, which gives the first n arrivals, into one that takes a horizon."""

    def arrivals(horizon: float) -> Seconds:
        n = int(1.2 * horizon * mean_rate) + 100
        times = make(n)
        while times[-1] < horizon:
            n *= 2
            times = make(n)
        return times[times < horizon]

    return arrivals
