"""Queues written down plainly and fast, and what theory says of their means. Sizes and times are in any one unit."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sizes_of(law: str, count: int, random: np.random.Generator) -> Floats:
    """Services of mean 1: constant, exponential, or one of two exponentials (H2, balanced means) of variance 9."""
    if law == "constant":
        return np.ones(count)
    if law == "exponential":
        return random.exponential(1, count)
    short = (1 + math.sqrt((9 - 1) / (9 + 1))) / 2
    return random.exponential(1, count) / (2 * np.where(random.random(count) < short, short, 1 - short))


def poisson(sizes: NDArray, utilisation: float, random: np.random.Generator, servers: int = 1) -> Floats:
    """Arrivals at which the servers are exactly so busy."""
    gaps = random.exponential(1, len(sizes))
    return np.cumsum(gaps * (sizes.mean() / (utilisation * servers) / gaps.mean()))


# When each ends, ties in the order of arrival. Exact for whole numbers.


def fcfs(sizes: Sequence, arrivals: Sequence, servers: int = 1) -> list:
    """First come, first served, by whichever server is free first (Kiefer and Wolfowitz)."""
    free, ends = [0] * servers, []
    for size, at in zip(sizes, arrivals, strict=True):
        ends.append(max(at, free[0]) + size)
        heapq.heapreplace(free, ends[-1])
    return ends


def sjf(sizes: Sequence, arrivals: Sequence) -> list:
    """The shortest of those there, whenever the server is free."""
    ends, here, now, come = [0] * len(sizes), [], 0, 0
    while come < len(sizes) or here:
        now = now if here else max(now, arrivals[come])
        while come < len(sizes) and arrivals[come] <= now:
            heapq.heappush(here, (sizes[come], come))
            come += 1
        size, i = heapq.heappop(here)
        now += size
        ends[i] = now
    return ends


def srpt(sizes: Sequence, arrivals: Sequence) -> list:
    """Whoever has the least left, at any time."""
    ends, here, now = [0] * len(sizes), [], 0
    for come, at in [*enumerate(arrivals), (len(sizes), math.inf)]:
        while here:
            left, i = here[0]
            if now + left > at:
                heapq.heapreplace(here, (left - (at - now), i))
                break
            heapq.heappop(here)
            now += left
            ends[i] = now
        now = at
        if come < len(sizes):
            heapq.heappush(here, (sizes[come], come))
    return ends


def processor_sharing(sizes: Sequence, arrivals: Sequence) -> list:
    """All at once, at equal speeds: whoever has least left ends after as many times as long as there are others."""
    ends, here, now, each = [0] * len(sizes), [], 0, 0.0  # `each`: what one that was always there has been given
    for come, at in [*enumerate(arrivals), (len(sizes), math.inf)]:
        while here:
            end, i = here[0]
            if now + (end - each) * len(here) > at:
                each += (at - now) / len(here)
                break
            now += (end - each) * len(here)
            each = end
            heapq.heappop(here)
            ends[i] = now
        now = at
        if come < len(sizes):
            heapq.heappush(here, (each + sizes[come], come))
    return ends


def las(sizes: Sequence[int], arrivals: Sequence[int]) -> list[int]:
    """A unit for whoever has been given least, again and again."""
    ends, here, now, come = [0] * len(sizes), [], 0, 0
    while come < len(sizes) or here:
        now = now if here else max(now, arrivals[come])
        while come < len(sizes) and arrivals[come] <= now:
            heapq.heappush(here, (0, come))
            come += 1
        given, i = heapq.heappop(here)
        now += 1
        if given + 1 == sizes[i]:
            ends[i] = now
        else:
            heapq.heappush(here, (given + 1, i))
    return ends


def mean_time(ends: Sequence, arrivals: Sequence, sizes: Sequence) -> float:
    """Mean time from arrival to end, in mean services."""
    return float(np.mean(np.asarray(ends) - np.asarray(arrivals)) / np.mean(sizes))


# Mean times in an M/G/1 queue whose services have the distribution of a sample, in mean services


def mean_fcfs(sizes: Floats, utilisation: float) -> float:
    """Pollaczek and Khinchine."""
    return 1 + utilisation * _second(sizes) / (2 * (1 - utilisation))


def mean_sharing(utilisation: float) -> float:
    """Whatever the distribution."""
    return 1 / (1 - utilisation)


def mean_sjf(sizes: Floats, utilisation: float) -> float:
    """Phipps: a wait of lambda E[S^2] / (2 (1 - rho(x))^2) for a size of x, rho(x) being the load up to x."""
    load = utilisation * np.cumsum(np.sort(sizes)) / sizes.sum()
    return 1 + float(np.mean(utilisation * _second(sizes) / (2 * (1 - load) ** 2)))


def mean_srpt(sizes: Floats, utilisation: float) -> float:
    """Schrage and Miller: lambda (E[S^2; S <= x] + x^2 P(S > x)) / (2 (1 - rho(x))^2) until it is served first, and
    then the integral of 1 / (1 - rho(t)) from 0 to x."""
    x = np.sort(sizes) / sizes.mean()
    count = len(x)
    load = utilisation * np.cumsum(x) / count
    cut = (np.cumsum(x**2) + x**2 * (count - 1 - np.arange(count))) / count
    before = np.concatenate(([0], load[:-1]))
    residence = np.cumsum(np.diff(x, prepend=0) / (1 - before))
    return float(np.mean(utilisation * cut / (2 * (1 - load) ** 2) + residence))


def mean_of_servers(servers: int, utilisation: float) -> float:
    """Erlang C: exponential services, a queue for several servers."""
    offered = servers * utilisation
    busy = offered**servers / math.factorial(servers) / (1 - utilisation)
    waits = busy / (busy + sum(offered**k / math.factorial(k) for k in range(servers)))
    return 1 + waits / (servers * (1 - utilisation))


def _second(sizes: Floats) -> float:
    return float(np.mean(sizes**2) / np.mean(sizes) ** 2)
