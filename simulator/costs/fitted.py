"""Step times from measured ones: what `simulator.costs.fitting` fitted, evaluated fast."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from policies.shapes import StepShape
from simulator.costs.base import StepCost, regime, whole_ns
from simulator.costs.calibration import (
    DEVICE_TERMS,
    FINISH_TERMS,
    PREPARE_TERMS,
    Calibration,
    CalibrationError,
    ModeFit,
)


@dataclass(frozen=True, slots=True)
class _Curves:
    """One mode's coefficients, laid out for the hot path: a step is priced some hundred thousand times a second."""

    knots: tuple[int, ...]
    levels: tuple[float, ...]  # ns at each knot, the constant included
    slopes: tuple[float, ...]  # ns a token from each knot on
    device: tuple[float, ...]  # in the order of DEVICE_TERMS, without the constant
    prepare: tuple[float, ...]
    finish: tuple[float, ...]

    @classmethod
    def of(cls, fit: ModeFit) -> _Curves:
        level = fit.device["step"]
        levels = [level]
        for here, following in pairwise(fit.tokens):
            level += here.ns * (following.above - here.above)
            levels.append(level)
        return cls(
            knots=tuple(slope.above for slope in fit.tokens),
            levels=tuple(levels),
            slopes=tuple(slope.ns for slope in fit.tokens),
            device=tuple(fit.device[term] for term in DEVICE_TERMS[1:]),
            prepare=tuple(fit.prepare[term] for term in PREPARE_TERMS),
            finish=tuple(fit.finish[term] for term in FINISH_TERMS),
        )


class FittedCost:
    """A sum of terms, each of them a measured price times a size of the step, none of them negative.

    Copies to host memory and back cost nothing where the calibration has no price for them (`prices_swaps`).

    So no prediction is negative, and none falls when a size grows. Steps from captured graphs and eager ones have
    prices of their own; where only one of the two was measured it stands in for the other, and `inside` says no.
    Raises CalibrationError for a calibration with neither.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        graph, eager = calibration.graph, calibration.eager
        if graph is None and eager is None:
            raise CalibrationError("the calibration has no fit, neither graph nor eager; make it anew")
        self._graph = _Curves.of(graph or eager)  # type: ignore[arg-type]
        self._eager = _Curves.of(eager or graph)  # type: ignore[arg-type]
        self._swap = calibration.swap
        self._ranges = {(measured.graph, measured.regime): measured for measured in calibration.ranges}

    @classmethod
    def load(cls, path: Path) -> FittedCost:
        """From a file that `save` wrote. Raises CalibrationError."""
        return cls(Calibration.load(path))

    def save(self, path: Path) -> None:
        """Write the calibration as JSON; the model that `load` makes of it predicts the same, bit for bit."""
        self.calibration.save(path)

    def cost(self, shape: StepShape) -> StepCost:
        curves = self._graph if shape.graph else self._eager
        tokens, chunks, samples, decodes = shape.padded_tokens, shape.num_chunks, shape.num_samples, shape.num_decodes
        at = bisect_right(curves.knots, tokens) - 1
        device = curves.levels[at] + curves.slopes[at] * (tokens - curves.knots[at])
        any_chunk, decode, decode_context, longest, chunk, pairs, chunk_context, sample = curves.device
        device += decode * decodes + decode_context * shape.decode_context + longest * shape.max_context
        device += sample * samples
        prepare, prepare_decode, prepare_chunk, prepare_token = curves.prepare
        prepare += prepare_decode * decodes
        if chunks:
            device += any_chunk + chunk * chunks + pairs * shape.chunk_pairs + chunk_context * shape.chunk_context
            prepare += prepare_chunk * chunks + prepare_token * shape.chunk_tokens
        if self._swap is not None and (shape.swapped_out or shape.swapped_in):
            swap = self._swap
            device += swap.copies * ((shape.swapped_out > 0) + (shape.swapped_in > 0))
            device += swap.swapped_out * shape.swapped_out + swap.swapped_in * shape.swapped_in
        finish, finish_sample = curves.finish
        return StepCost(whole_ns(prepare), whole_ns(device), whole_ns(finish + finish_sample * samples))

    def step_ns(self, shape: StepShape) -> int:
        return self.cost(shape).total_ns

    def inside(self, shape: StepShape) -> bool:
        """Whether steps of this kind, run this way, were measured with every size as small and as large."""
        if (shape.swapped_out or shape.swapped_in) and self._swap is None:
            return False
        measured = self._ranges.get((shape.graph, regime(shape)))
        return measured is not None and measured.holds(shape)

    @property
    def prices_swaps(self) -> bool:
        """Whether copies to host memory and back were measured."""
        return self._swap is not None

    def describe(self) -> dict[str, object]:
        return {"kind": "fitted", **self.calibration.model_dump()}
