"""Step times from measured ones: what `simulator.costs.fitting` fitted, evaluated fast."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
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
    Slope,
)
from simulator.costs.history import FittedHistory, History


class _Curve:
    """Piecewise linear, from 0 on."""

    __slots__ = ("_knots", "_levels", "_slopes")

    def __init__(self, slopes: Sequence[Slope]) -> None:
        level, levels = 0.0, [0.0]
        for here, following in pairwise(slopes):
            level += here.ns * (following.above - here.above)
            levels.append(level)
        self._knots = tuple(slope.above for slope in slopes)
        self._levels = tuple(levels)
        self._slopes = tuple(slope.ns for slope in slopes)

    def at(self, size: int) -> float:
        i = bisect_left(self._knots, size) - 1
        return self._levels[i] + self._slopes[i] * (size - self._knots[i]) if i > 0 else self._slopes[0] * size


@dataclass(frozen=True, slots=True)
class _Prices:
    """One mode's coefficients, laid out for the hot path: a step is priced some hundred thousand times a second."""

    tokens: _Curve
    context: _Curve
    longest: _Curve
    sizes: tuple[int, ...]  # above which padded size the price of a token of context is the next one
    by_size: tuple[float, ...]
    device: tuple[float, ...]  # in the order of DEVICE_TERMS
    prepare: tuple[float, ...]
    finish: tuple[float, ...]

    @classmethod
    def of(cls, fit: ModeFit) -> _Prices:
        return cls(
            tokens=_Curve(fit.padded_tokens),
            context=_Curve(fit.decode_context),
            longest=_Curve(fit.max_context),
            sizes=tuple(slope.above for slope in fit.context_by_size[1:]),
            by_size=tuple(slope.ns for slope in fit.context_by_size),
            device=tuple(fit.device[term] for term in DEVICE_TERMS),
            prepare=tuple(fit.prepare[term] for term in PREPARE_TERMS),
            finish=tuple(fit.finish[term] for term in FINISH_TERMS),
        )


class FittedCost:
    """A sum of terms, each of them a measured price times a size of the step, none of them negative.

    Copies to host memory and back cost nothing where the calibration has no price for them (`prices_swaps`), and
    neither do the names and look-ups of prefix caching.

    So no prediction is negative, and among steps that run the same way none falls when a size grows, but for padded
    tokens: the larger a captured batch, the better a card may divide its context. Steps that ran in different ways have
    prices of their own; where one was not measured another stands in for it, and `inside` says no. Raises
    CalibrationError for a calibration with none.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        decode, chunked, other = calibration.decode, calibration.chunked, calibration.other
        self._decode_fit = decode or other or chunked
        self._chunked_fit = chunked or other or decode
        self._other_fit = other or chunked or decode
        if self._decode_fit is None or self._chunked_fit is None or self._other_fit is None:
            raise CalibrationError("the calibration has no fit, neither decode, chunked nor other; make it anew")
        self._decode, self._chunked = _Prices.of(self._decode_fit), _Prices.of(self._chunked_fit)
        self._other = _Prices.of(self._other_fit)
        self._swap, self._lookups = calibration.swap, calibration.lookups
        self._ranges = {(measured.graph, measured.regime): measured for measured in calibration.ranges}

    @classmethod
    def load(cls, path: Path) -> FittedCost:
        """From a file that `save` wrote. Raises CalibrationError."""
        return cls(Calibration.load(path))

    def save(self, path: Path) -> None:
        """Write the calibration as JSON; the model that `load` makes of it predicts the same, bit for bit."""
        self.calibration.save(path)

    def cost(self, shape: StepShape) -> StepCost:
        chunks, decodes, samples = shape.num_chunks, shape.num_decodes, shape.num_samples
        prices = self._other if not shape.graph else self._chunked if chunks else self._decode
        step, any_decode, any_chunk, decode, chunk, token, pairs, chunk_context, sample = prices.device
        device = step + prices.tokens.at(shape.padded_tokens) + prices.longest.at(shape.max_context)
        device += decode * decodes + sample * samples
        if decodes:
            device += any_decode
        if context := shape.decode_context:
            by_size = prices.by_size[bisect_left(prices.sizes, shape.padded_tokens)]
            device += prices.context.at(context) + by_size * context
        prepare, prepare_decode, prepare_chunk, prepare_token = prices.prepare
        prepare += prepare_decode * decodes
        if chunks:
            device += any_chunk + chunk * chunks + token * shape.chunk_tokens
            device += pairs * shape.chunk_pairs + chunk_context * shape.chunk_context
            prepare += prepare_chunk * chunks + prepare_token * shape.chunk_tokens
        if self._swap is not None and (shape.swapped_out or shape.swapped_in):
            swap = self._swap
            device += swap.copies * ((shape.swapped_out > 0) + (shape.swapped_in > 0))
            device += swap.swapped_out * shape.swapped_out + swap.swapped_in * shape.swapped_in
        if self._lookups is not None and shape.looks_up:
            lookups = self._lookups
            prepare += lookups.num_named * shape.num_named + lookups.named_blocks * shape.named_blocks
            prepare += lookups.looked_up_blocks * shape.looked_up_blocks
        finish, finish_sample = prices.finish
        return StepCost(whole_ns(prepare), whole_ns(device), whole_ns(finish + finish_sample * samples))

    def device_terms(self, shape: StepShape) -> dict[str, float]:
        """Of what the device's time is made, in nanoseconds: `products` with whatever each step takes, `attention`,
        `sampling`, and `copies` of KV to host memory and back. They sum to what `cost` rounds."""
        fit, prices = self._fit_of(shape), self._prices_of(shape)
        device, context = fit.device, shape.decode_context
        by_size = prices.by_size[bisect_left(prices.sizes, shape.padded_tokens)] if context else 0.0
        products = device["step"] + prices.tokens.at(shape.padded_tokens) + device["chunk_tokens"] * shape.chunk_tokens
        attention = prices.longest.at(shape.max_context) + prices.context.at(context) + by_size * context
        for name in ("num_decodes", "num_chunks", "chunk_pairs", "chunk_context"):
            attention += device[name] * getattr(shape, name)
        products += device["any_decode"] * (shape.num_decodes > 0) + device["any_chunk"] * (shape.num_chunks > 0)
        found = {"products": products, "attention": attention, "sampling": device["num_samples"] * shape.num_samples}
        if self._swap is not None and (shape.swapped_out or shape.swapped_in):
            found["copies"] = self._swap.copies * ((shape.swapped_out > 0) + (shape.swapped_in > 0))
            found["copies"] += self._swap.swapped_out * shape.swapped_out + self._swap.swapped_in * shape.swapped_in
        return found

    def step_ns(self, shape: StepShape) -> int:
        return self.cost(shape).total_ns

    def history(self) -> History | None:
        """What a step takes beside its own cost, for one replica from its start on."""
        calibration = self.calibration
        if calibration.under_load is None and calibration.delay is None:
            return None
        return FittedHistory(calibration.under_load, calibration.delay, self._fit_of)

    def _fit_of(self, shape: StepShape) -> ModeFit:
        found = self._other_fit if not shape.graph else self._chunked_fit if shape.num_chunks else self._decode_fit
        assert found is not None
        return found

    def _prices_of(self, shape: StepShape) -> _Prices:
        return self._other if not shape.graph else self._chunked if shape.num_chunks else self._decode

    def inside(self, shape: StepShape) -> bool:
        """Whether steps of this kind, run this way, were measured with every size as small and as large."""
        if (shape.swapped_out or shape.swapped_in) and self._swap is None:
            return False
        measured = self._ranges.get((shape.graph, regime(shape)))
        return measured is not None and measured.holds(shape)

    @property
    def overlaps_copies(self) -> bool:
        """Whether copies to host memory and back are made beside the steps (`simulator.copy_links`)."""
        return self._swap is not None and self._swap.overlaps

    @property
    def prices_swaps(self) -> bool:
        """Whether copies to host memory and back were measured."""
        return self._swap is not None

    def describe(self) -> dict[str, object]:
        return {"kind": "fitted", **self.calibration.model_dump()}
