"""Fits what steps take beside their own cost (`simulator.costs.history`): the slowdown under load, a host's delays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from policies.shapes import StepShape
from simulator.costs.calibration import DelayFit, LoadFit
from simulator.costs.fitted import FittedCost
from simulator.costs.history import LoadMeter
from simulator.costs.samples import StepSample

TIME_CONSTANTS_NS = (10_000_000, 20_000_000, 35_000_000, 50_000_000, 70_000_000, 100_000_000, 200_000_000)
MIN_STEPS = 500
"""Fewer steps in a row tell no slowdown; in a way to run, fewer than a fifth of it."""
MIN_GAIN = 0.05
"""By how much errors must fall for the slowdown to be real."""
_FAR_OFF = 0.25  # relative errors beyond are other things' doing
SPARE_NS = (0, *(50_000 << k for k in range(10)))


@dataclass(frozen=True, slots=True)
class Corrections:
    """Each sample's load, and each mode's slowdown and usual load."""

    load_fit: LoadFit | None
    modes: Mapping[str, tuple[float, float]]
    loads: Mapping[int, float]  # by id of the sample, which the caller keeps

    @classmethod
    def none(cls) -> Corrections:
        return cls(None, {}, {})

    @property
    def load(self) -> LoadFit:
        assert self.load_fit is not None
        return self.load_fit

    def factor(self, sample: StepSample) -> float:
        """By how much more time it took than under the usual load."""
        slowdown, usual = self.modes.get(mode_of(sample.shape), (0.0, 0.0))
        return (1 + slowdown * self.loads[id(sample)]) / (1 + slowdown * usual) if slowdown else 1.0


def mode_of(shape: StepShape) -> str:
    return "other" if not shape.graph else "chunked" if shape.num_chunks else "decode"


def fit_load(
    model: FittedCost, samples: Sequence[StepSample], time_constant_ns: int | None = None
) -> Corrections | None:
    """How much slower steps are under load than the model says, which is of no load or of an earlier fit's usual one.

    None where starts are not known, steps are few, or errors do not fall by it.
    """
    if len(samples) < MIN_STEPS or any(sample.started_ns is None for sample in samples):
        return None
    ordered = sorted(samples, key=lambda sample: sample.started_ns or 0)
    costs = np.array([max(1, model.cost(sample.shape).device_ns) for sample in ordered], np.float64)
    residuals = np.array([sample.device_ns for sample in ordered]) / costs - 1
    tokens = np.array([sample.shape.padded_tokens for sample in ordered])
    full_rate = float(np.quantile(tokens / costs, 0.99))
    known = np.array(
        [sample.waited and not (sample.shape.swapped_out or sample.shape.swapped_in) for sample in ordered]
    )
    known &= np.abs(residuals) < _FAR_OFF
    modes = np.array([mode_of(sample.shape) for sample in ordered])
    serving = np.array([sample.serving for sample in ordered])
    best: tuple[float, Corrections] | None = None
    for constant in TIME_CONSTANTS_NS if time_constant_ns is None else (time_constant_ns,):
        load_fit = LoadFit(time_constant_ns=constant, full_rate=full_rate)
        loads = _loads(ordered, costs, load_fit)
        found, before, after = {}, 0.0, 0.0
        for mode in ("decode", "chunked", "other"):
            rows = known & (modes == mode)
            if rows.sum() < MIN_STEPS / 5 or mode == "other":
                continue
            level, slope = _line(loads[rows], residuals[rows])
            slowdown = max(0.0, slope) / max(0.5, level)
            usual = float(loads[rows & serving].mean() if (rows & serving).any() else loads[rows].mean())
            found[mode] = (slowdown, usual)
            before += float(np.abs(residuals[rows]).sum())
            after += float(np.abs(1 + residuals[rows] - level - slope * loads[rows]).sum())
        kept = Corrections(load_fit, found, dict(zip(map(id, ordered), loads.tolist(), strict=True)))
        if found and (best is None or after < best[0]) and (time_constant_ns or after < (1 - MIN_GAIN) * before):
            best = (after, kept)
    return None if best is None else best[1]


def _line(loads: np.ndarray, residuals: np.ndarray) -> tuple[float, float]:
    columns = np.column_stack([np.ones(len(loads)), loads])
    level, slope = np.linalg.lstsq(columns, 1 + residuals, rcond=None)[0]
    return float(level), float(slope)


def _loads(ordered: Sequence[StepSample], costs: np.ndarray, fit: LoadFit) -> np.ndarray:
    meter = LoadMeter(fit)
    loads = np.empty(len(ordered))
    for i, sample in enumerate(ordered):
        started = sample.started_ns or 0
        loads[i] = meter.at(started)
        meter.ran(sample.shape, float(costs[i]), started, sample.device_ns)
    return loads


def delays(model: FittedCost, samples: Sequence[StepSample], fewest: int) -> DelayFit | None:
    """By how much the host was later than the model says, among a server's requests, where it works beside the device:
    from the end of a step until the step after the next one is launched. Not of steps that copy KV to host memory or
    back, which is work of their own."""
    later = []
    for before, sample in zip(samples, samples[2:], strict=False):
        copies = any(s.shape.swapped_out or s.shape.swapped_in for s in (before, sample))
        if before.serving and sample.serving and before.finish_ns is not None and not copies:
            meant = model.cost(before.shape).finish_ns + model.cost(sample.shape).prepare_ns
            later.append(before.finish_ns + sample.prepare_ns - meant)
    if len(later) < fewest:
        return None
    excess = np.array(later, np.float64)
    return DelayFit(
        spare_ns=list(SPARE_NS), mean_ns=[float(np.maximum(0, excess - spare).mean()) for spare in SPARE_NS]
    )
