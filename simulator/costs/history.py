"""What a step takes beside the cost of its own shape: it depends on the steps before it, and on chance.

Two effects were measured on an H100. At the power limit its clocks fall: a prompt's chunk takes up to a sixth longer
where the tenth of a second before it was all chunks. And the host, whose work is hidden behind the device's, is late
now and then: a simulation without chance cannot say when, but how long the device waits for it in the mean.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import exp
from typing import Protocol, runtime_checkable

from policies.shapes import StepShape
from simulator.costs.base import whole_ns
from simulator.costs.calibration import DelayFit, LoadFit, ModeFit


class History(Protocol):
    """Of one replica, from its start on."""

    def device_ns(self, shape: StepShape, cost_ns: int, started_ns: int) -> int:
        """How long a step takes that costs so much by itself and starts on the device then."""
        ...

    def ran(self, shape: StepShape, cost_ns: int, started_ns: int, device_ns: int) -> None:
        """It did, and took that long: in order."""
        ...

    def delay_ns(self, spare_ns: int) -> int:
        """How long the device waits in the mean for a host that means to be so much earlier than needed."""
        ...


@runtime_checkable
class HasHistory(Protocol):
    """A cost model whose steps depend on those before them."""

    def history(self) -> History | None:
        """A new one; None: they do not."""
        ...


class LoadMeter:
    """The load of `LoadFit`, as time goes on."""

    def __init__(self, fit: LoadFit) -> None:
        self._fit = fit
        self._load = 0.0
        self._until = 0

    def at(self, now: int) -> float:
        """Before a step that starts now. Time does not go back; a start before the end of the last step is that end."""
        return self._load * exp(-max(0, now - self._until) / self._fit.time_constant_ns)

    def ran(self, shape: StepShape, cost_ns: float, started: int, duration: int) -> None:
        """A step, with what it would have cost under the usual load."""
        share = min(1.0, shape.padded_tokens / max(1.0, cost_ns) / self._fit.full_rate)
        kept = exp(-duration / self._fit.time_constant_ns)
        self._load = self.at(started) * kept + share * (1 - kept)
        self._until = max(started, self._until) + duration


def slowdown_of(fit: ModeFit, load: float) -> float:
    """The factor on the device's time."""
    return (1 + fit.slowdown * load) / (1 + fit.slowdown * fit.usual_load)


class FittedHistory:
    """Both effects, where they were measured."""

    def __init__(self, load: LoadFit | None, delay: DelayFit | None, fit_of: Callable[[StepShape], ModeFit]) -> None:
        self._meter = None if load is None else LoadMeter(load)
        self._delay = delay
        self._fit_of = fit_of

    def device_ns(self, shape: StepShape, cost_ns: int, started_ns: int) -> int:
        if self._meter is None:
            return cost_ns
        return whole_ns(cost_ns * slowdown_of(self._fit_of(shape), self._meter.at(started_ns)))

    def ran(self, shape: StepShape, cost_ns: int, started_ns: int, device_ns: int) -> None:
        if self._meter is not None:
            self._meter.ran(shape, cost_ns, started_ns, device_ns)

    def delay_ns(self, spare_ns: int) -> int:
        if self._delay is None or spare_ns < 0:  # who is late anyway is late by as much in the mean
            return 0
        spare, mean = self._delay.spare_ns, self._delay.mean_ns
        i = bisect_right(spare, spare_ns)
        if i in (0, len(spare)):
            return whole_ns(mean[min(i, len(spare) - 1)])
        share = (spare_ns - spare[i - 1]) / (spare[i] - spare[i - 1])
        return whole_ns(mean[i - 1] + share * (mean[i] - mean[i - 1]))
