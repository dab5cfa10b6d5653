"""Step times drawn around a fit's predictions, as far off as it was on steps that it had not seen.

A fit has one number for a step; how far that is off is known from held-out steps (`Calibration.held_out`). To draw is
to take for each kind of step one of those errors, so that runs with several seeds give a band. The errors of like
steps are alike: what a fit gets wrong about prompts of a thousand tokens it gets wrong about all of them. So a draw
counts for all steps of a kind whose sizes are the same to a factor of two. That errs on the wide side, since some of
an error is chance, which evens out over the steps of a run; drawn anew for each step nearly all of it would.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from policies.random_stream import RandomStream
from policies.shapes import StepShape
from simulator.costs.base import Regime, StepCost, regime, whole_ns
from simulator.costs.calibration import CalibrationError, HeldOutError
from simulator.costs.fitted import FittedCost
from simulator.costs.history import History

REGIMES: tuple[Regime, ...] = ("decode", "prefill", "mixed")
TAIL = 1.5
"""Of a calibration without quantiles: the largest error over the one that nine in ten are below."""

LEAST = -0.9
"""Nothing takes more than ten times what a fit says."""


class DrawnCost:
    """A fitted cost whose device times are off by held-out errors, drawn by (seed, kind of step, sizes).

    `around` is the fit itself, which policies that plan by costs are told. Pure, as every cost model: the same shape
    costs the same. Raises CalibrationError for a calibration without held-out errors.
    """

    def __init__(self, fitted: FittedCost, seed: int) -> None:
        self.around = fitted
        self.seed = seed
        found = {(error.regime, error.part): error for error in fitted.calibration.held_out}
        if not found:
            raise CalibrationError("the calibration has no held-out errors to draw from; profile for longer")
        most = max(found.values(), key=lambda error: error.num_samples)
        errors = {kind: found.get((kind, "device")) or found.get((kind, "step")) or most for kind in REGIMES}
        self._quantiles = {kind: quantiles_of(error) for kind, error in errors.items()}
        self._streams = {kind: RandomStream(seed, f"residual {kind}") for kind in REGIMES}
        self._factors: dict[tuple[Regime, int, int], float] = {}

    def cost(self, shape: StepShape) -> StepCost:
        prepare, device, finish = self.around.cost(shape)
        return StepCost(prepare, whole_ns(device * self.factor(shape)), finish)

    def step_ns(self, shape: StepShape) -> int:
        return self.cost(shape).total_ns

    def factor(self, shape: StepShape) -> float:
        """What a step that the fit predicts takes, over that."""
        kind = regime(shape)
        work = (shape.chunk_tokens if shape.num_chunks else shape.num_decodes).bit_length()
        context = (shape.decode_context + shape.chunk_context).bit_length()
        key = kind, work, context
        factor = self._factors.get(key)
        if factor is None:
            error = at(self._quantiles[kind], self._streams[kind].uniform(work, context))
            factor = self._factors[key] = 1 / (1 + max(error, LEAST))
        return factor

    def inside(self, shape: StepShape) -> bool:
        """As of the fit."""
        return self.around.inside(shape)

    def history(self) -> History | None:
        """As of the fit."""
        return self.around.history()

    @property
    def overlaps_copies(self) -> bool:
        """As of the fit."""
        return self.around.overlaps_copies

    def describe(self) -> dict[str, object]:
        return {**self.around.describe(), "residuals": self.seed}


def quantiles_of(error: HeldOutError) -> Sequence[float]:
    """Evenly spaced quantiles of (predicted - measured) / measured, lowest first.

    Of a calibration that has only the quantiles of its size: as often too high as too low, about the bias, its size
    linear between what is known.
    """
    if error.quantiles:
        return error.quantiles
    size = ((0.0, 0.0), (0.5, error.p50), (0.9, error.p90), (1.0, TAIL * error.p90))
    half = [_between(size, k / 10) for k in range(11)]
    return [error.bias - one for one in half[:0:-1]] + [error.bias + one for one in half]


def at(quantiles: Sequence[float], share: float) -> float:
    """The quantile at a share from 0 to 1, linear between those that are known."""
    place = share * (len(quantiles) - 1)
    low = min(int(place), len(quantiles) - 2)
    return quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    i = min(bisect_right([at for at, _ in points], x), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)
