"""Fits step times: non-negative least squares on sizes of the step, robust, and checked on what was held out.

Errors are relative: a fit that is 1% off is as good at 1 ms as at 100 ms. Captured steps of decodes alone, captured
ones with chunks, and the others are fitted each by themselves. What a device took is known from the steps whose end the
host was waiting for; what the host took, from all of them, and in the mean as it was among a server's requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from pydantic import JsonValue

from policies.plan import NO_COPIES
from policies.shapes import StepShape
from simulator.costs.base import Regime, regime
from simulator.costs.calibration import (
    FINISH_TERMS,
    PREPARE_TERMS,
    RANGE_FIELDS,
    Calibration,
    HeldOutError,
    MeasuredRange,
    ModeFit,
    Part,
    SwapFit,
)
from simulator.costs.features import DeviceFeatures, term
from simulator.costs.fitted import FittedCost
from simulator.costs.history_fit import Corrections, delays, fit_load
from simulator.costs.least_squares import FLOOR_NS, Array, robust_nnls
from simulator.costs.lookup_fit import lookups
from simulator.costs.samples import StepSample

MIN_SHAPES = 10
"""Fewer distinct shapes than this are no measurement."""
MIN_SWAPS = 4
"""Distinct amounts of swapped KV, fewer of which give no price."""
MIN_SERVING = 100
"""Steps among a server's requests, fewer of which say nothing of a mean."""
QUANTILES = 41
"""Of the held-out errors, that are kept to draw from."""
_FOLDS = 5
_MODES = ("decode", "chunked", "other")


def fit(samples: Sequence[StepSample], provenance: Mapping[str, JsonValue] | None = None) -> FittedCost:
    """A cost model from measured steps, with its error on held-out ones; `provenance` is kept with it as it is.

    Repeats of a shape count as their median. Raises ValueError for fewer than 10 distinct shapes and for negative
    times.
    """
    for sample in samples:
        if min(sample.prepare_ns, sample.device_ns, sample.finish_ns or 0) < 0:
            raise ValueError(f"a step cannot take less than no time: {sample}")
    plain = [sample for sample in samples if not _swaps(sample.shape)]
    points = _points(plain)
    if len(points) < MIN_SHAPES:
        raise ValueError(
            f"a fit needs steps of at least {MIN_SHAPES} distinct shapes, not {len(points)}; profile more sizes"
        )
    model, corrections = _model(points, {}), Corrections.none()
    found = fit_load(model, samples)
    if found is not None:
        for _ in range(3):  # prices without the slowdown and the slowdown, in turn
            corrections = found
            model = _model(points, {}, corrections)
            found = fit_load(model, samples, time_constant_ns=corrections.load.time_constant_ns) or corrections
    held_out = _held_out_errors(points, corrections)
    swapping = [sample for sample in samples if _swaps(sample.shape)]
    timed = any(sample.copies != NO_COPIES for sample in swapping)  # earlier measurements did not time copies
    swap = _link_fit(swapping) if timed else _swap_fit(model, _points(swapping), corrections)
    return FittedCost(
        model.calibration.model_copy(
            update={
                "provenance": dict(provenance or {}),
                "held_out": held_out,
                "swap": swap,
                "lookups": lookups(model, samples),
                "delay": delays(model, samples, MIN_SERVING),
            }
        )
    )


def _swaps(shape: StepShape) -> bool:
    return bool(shape.swapped_out or shape.swapped_in)


def _link_fit(samples: Sequence[StepSample]) -> SwapFit | None:
    """Prices of copies from how long they took themselves; they are made beside the steps where those have waited for
    less than that. Copies out may have been counted with a later step's, and then neither counts. None where fewer than
    MIN_SWAPS amounts were measured."""
    sizes, times = [], []
    for sample in samples:
        out, back = sample.shape.swapped_out, sample.shape.swapped_in
        if out and sample.copies.out_ns:
            sizes.append((1.0, float(out), 0.0))
            times.append(float(sample.copies.out_ns))
        if back:
            sizes.append((1.0, 0.0, float(back)))
            times.append(float(sample.copies.in_ns))
    if len(set(sizes)) < MIN_SWAPS:
        return None
    copies, out_ns, in_ns = robust_nnls(np.array(sizes), times, [1] * len(times))
    waited = sum(sample.copies.wait_ns for sample in samples)
    overlaps = waited < 0.9 * sum(sample.copies.out_ns + sample.copies.in_ns for sample in samples)
    return SwapFit(num_samples=len(times), copies=copies, swapped_out=out_ns, swapped_in=in_ns, overlaps=overlaps)


def _swap_fit(model: FittedCost, points: Sequence[_Point], corrections: Corrections) -> SwapFit | None:
    """Prices of copies: what steps with copies took beyond the model's time for the same steps without. None where
    fewer than MIN_SWAPS steps were measured, or all copied as much."""
    if len({(point.shape.swapped_out, point.shape.swapped_in) for point in points}) < MIN_SWAPS:
        return None
    columns = [
        [
            float((shape.swapped_out > 0) + (shape.swapped_in > 0)),
            float(shape.swapped_out),
            float(shape.swapped_in),
        ]
        for shape in (point.shape for point in points)
    ]
    plain = [model.cost(point.shape._replace(swapped_out=0, swapped_in=0)).device_ns for point in points]
    times = [_device_ns(point, corrections) for point in points]
    # Noise is that of whole steps: some take less than the same without copies, and count like those that take more.
    copies, out, back = robust_nnls(np.array(columns), times, _counts(points), plain)
    count = sum(len(point.samples) for point in points)
    return SwapFit(num_samples=count, copies=copies, swapped_out=out, swapped_in=back)


@dataclass(frozen=True, slots=True)
class _Point:
    """All samples of one shape; `timed`: those whose device time is known, or all where it is for none."""

    shape: StepShape
    samples: tuple[StepSample, ...]
    timed: tuple[StepSample, ...]

    @property
    def waited(self) -> bool:
        return self.timed[0].waited


def _points(samples: Sequence[StepSample]) -> list[_Point]:
    """One point a distinct shape, in order of size; what was looked up for a step makes no difference to the device."""
    groups: dict[StepShape, list[StepSample]] = {}
    for sample in samples:
        shape = sample.shape._replace(num_named=0, named_blocks=0, looked_up_blocks=0)
        groups.setdefault(shape, []).append(sample)
    points = []
    for shape in sorted(groups, key=_by_size):
        group = tuple(groups[shape])
        points.append(_Point(shape, group, tuple(sample for sample in group if sample.waited) or group))
    return points


def _by_size(shape: StepShape) -> tuple[int, ...]:
    sizes = (int(getattr(shape, name)) for name in RANGE_FIELDS)
    return (shape.padded_tokens, *sizes, int(shape.graph), *shape[shape._fields.index("swapped_out") :])


def _counts(points: Sequence[_Point]) -> list[int]:
    return [len(point.samples) for point in points]


def _device_ns(point: _Point, corrections: Corrections) -> float:
    """Its median, under the usual load."""
    return median(sample.device_ns / corrections.factor(sample) for sample in point.timed)


def _model(
    points: Sequence[_Point], provenance: Mapping[str, JsonValue], corrections: Corrections | None = None
) -> FittedCost:
    corrections = corrections or Corrections.none()
    modes: dict[str, list[_Point]] = {name: [] for name in _MODES}
    for point in points:
        shape = point.shape
        modes["other" if not shape.graph else "chunked" if shape.num_chunks else "decode"].append(point)
    for name in ("decode", "chunked"):
        if len(modes[name]) < MIN_SHAPES:
            modes["other"] += modes.pop(name)
    fits = {name: _mode(modes[name], corrections, name) if modes.get(name) else None for name in _MODES}
    return FittedCost(
        Calibration(
            provenance=dict(provenance),
            decode=fits["decode"],
            chunked=fits["chunked"],
            other=fits["other"],
            under_load=corrections.load_fit,
            ranges=_ranges(points),
            held_out=[],
        )
    )


def _mode(points: Sequence[_Point], corrections: Corrections, name: str) -> ModeFit:
    exact = [point for point in points if point.waited]
    timed = exact if len(exact) >= MIN_SHAPES else points
    features = DeviceFeatures([point.shape for point in timed], captured=name != "other")
    device = robust_nnls(
        features.matrix([point.shape for point in timed]),
        [_device_ns(point, corrections) for point in timed],
        [len(point.timed) for point in timed],
    )
    samples = [sample for point in points for sample in point.samples]
    # Those that look up have prices of their own.
    prepared = [sample for sample in samples if not sample.shape.looks_up] or samples
    finished = [sample for sample in samples if sample.finish_ns is not None]
    slowdown, usual = corrections.modes.get(name, (0.0, 0.0))
    return ModeFit(
        num_samples=len(samples),
        num_finish_samples=len(finished),
        **features.named(device),
        prepare=_host_terms(prepared, [sample.prepare_ns for sample in prepared], PREPARE_TERMS),
        finish=_host_terms(finished, [sample.finish_ns or 0 for sample in finished], FINISH_TERMS),
        slowdown=slowdown,
        usual_load=usual,
    )


def _host_terms(samples: Sequence[StepSample], times: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """A host part's prices: robust, then as much higher or lower as the mean among a server's requests says, for rare
    long delays are part of what they wait for."""
    if not samples:
        return dict.fromkeys(names, 0.0)
    groups: dict[StepShape, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.shape, []).append(i)
    shapes = sorted(groups, key=_by_size)
    typical = [float(median(times[i] for i in groups[shape])) for shape in shapes]
    solution = robust_nnls(_terms(shapes, names), typical, [len(groups[shape]) for shape in shapes])
    serving = [i for i, sample in enumerate(samples) if sample.serving]
    scale = 1.0
    if len(serving) >= MIN_SERVING:
        predicted = float((_terms([samples[i].shape for i in serving], names) @ np.array(solution)).sum())
        scale = sum(times[i] for i in serving) / predicted if predicted > 0 else 1.0
    return {name: scale * price for name, price in zip(names, solution, strict=True)}


def _terms(shapes: Sequence[StepShape], names: Sequence[str]) -> Array:
    """[shapes, names]"""
    return np.column_stack([term(shapes, name) for name in names])


# What it is worth


def _ranges(points: Sequence[_Point]) -> list[MeasuredRange]:
    shapes: dict[tuple[bool, Regime], list[StepShape]] = {}
    for point in points:
        shapes.setdefault((point.shape.graph, regime(point.shape)), []).append(point.shape)
    ranges = []
    for (graph, kind), group in sorted(shapes.items()):
        sizes = {}
        for name in RANGE_FIELDS:
            values = [int(getattr(shape, name)) for shape in group]
            sizes[name] = [min(values), max(values)]
        ranges.append(MeasuredRange(graph=graph, regime=kind, sizes=sizes))
    return ranges


def _held_out_errors(points: Sequence[_Point], corrections: Corrections) -> list[HeldOutError]:
    """Every fifth shape is predicted from the other four fifths, five times; its single samples are compared."""
    pairs: dict[tuple[Regime, Part], list[tuple[float, float]]] = {}
    # Shifted by one every five, so that a grid of five contexts a size does not lose the same context everywhere.
    folds = [(index + index // _FOLDS) % _FOLDS for index in range(len(points))]
    for fold in range(_FOLDS):
        train = [point for point, its in zip(points, folds, strict=True) if its != fold]
        model = _model(train, {}, corrections)
        for point, its in zip(points, folds, strict=True):
            if its == fold:
                _compare(model, point, corrections, pairs)
    return [_error(kind, part, pairs[kind, part]) for kind, part in sorted(pairs)]


def _compare(
    model: FittedCost,
    point: _Point,
    corrections: Corrections,
    pairs: dict[tuple[Regime, Part], list[tuple[float, float]]],
) -> None:
    cost, kind = model.cost(point.shape), regime(point.shape)
    for sample in point.samples:
        device_ns = cost.device_ns * corrections.factor(sample)
        if sample.waited:
            pairs.setdefault((kind, "device"), []).append((device_ns, sample.device_ns))
        if sample.finish_ns is not None and not point.shape.looks_up:
            total = sample.prepare_ns + sample.device_ns + sample.finish_ns
            pairs.setdefault((kind, "step"), []).append((cost.prepare_ns + device_ns + cost.finish_ns, total))


def _error(kind: Regime, part: Part, pairs: Sequence[tuple[float, float]]) -> HeldOutError:
    predicted, measured = np.array(pairs, dtype=np.float64).T
    errors = np.abs(predicted - measured) / np.maximum(measured, FLOOR_NS)
    p50, p90 = np.quantile(errors, [0.5, 0.9])
    return HeldOutError(
        regime=kind,
        part=part,
        num_samples=len(pairs),
        mean=float(errors.mean()),
        p50=float(p50),
        p90=float(p90),
        bias=float(predicted.sum() / max(measured.sum(), FLOOR_NS) - 1),
        quantiles=np.quantile(
            (predicted - measured) / np.maximum(measured, FLOOR_NS), np.linspace(0, 1, QUANTILES)
        ).tolist(),
    )
