"""Fits step times: non-negative least squares on sizes of the step, robust, and checked on what was held out.

Errors are relative: a fit that is 1% off is as good at 1 ms as at 100 ms. Padded tokens enter piecewise linearly,
which interpolates between measured sizes whether the curve bends up or down (products of few tokens wait for the
weights, those of many for arithmetic). The other terms are what the work is physically linear in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue
from scipy.optimize import nnls

from policies.shapes import StepShape
from simulator.costs.base import Regime, regime
from simulator.costs.calibration import (
    DEVICE_TERMS,
    FINISH_TERMS,
    PREPARE_TERMS,
    RANGE_FIELDS,
    Calibration,
    HeldOutError,
    MeasuredRange,
    ModeFit,
    Part,
    SwapFit,
    TokenSlope,
)
from simulator.costs.fitted import FittedCost
from simulator.costs.samples import StepSample

Array = npt.NDArray[np.float64]

MIN_SHAPES = 10
"""Fewer distinct shapes than this are no measurement."""
MIN_SWAPS = 4
"""Distinct amounts of swapped KV, fewer of which give no price."""
_FOLDS = 5
_KNOT_RATIO = 1.5
_REWEIGHTINGS = 8
_OUTLIER = 3.0  # spreads beyond which a sample's influence falls
_FLOOR_NS = 1000.0  # below a microsecond an error counts as if the time were a microsecond


def fit(samples: Sequence[StepSample], provenance: Mapping[str, JsonValue] | None = None) -> FittedCost:
    """A cost model from measured steps, with its error on held-out ones; `provenance` is kept with it as it is.

    Repeats of a shape count as their median. Raises ValueError for fewer than 10 distinct shapes and for negative
    times.
    """
    points = _points([sample for sample in samples if not _swaps(sample.shape)])
    if len(points) < MIN_SHAPES:
        raise ValueError(
            f"a fit needs steps of at least {MIN_SHAPES} distinct shapes, not {len(points)}; profile more sizes"
        )
    model = _model(points, provenance or {})
    held_out = _held_out_errors(points)
    swap = _swap_fit(model, _points([sample for sample in samples if _swaps(sample.shape)]))
    return FittedCost(model.calibration.model_copy(update={"held_out": held_out, "swap": swap}))


def _swaps(shape: StepShape) -> bool:
    return bool(shape.swapped_out or shape.swapped_in)


def _swap_fit(model: FittedCost, points: Sequence[_Point]) -> SwapFit | None:
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
    # Noise is that of whole steps: some take less than the same without copies, and count like those that take more.
    copies, out, back = _robust_nnls(np.array(columns), [point.device_ns for point in points], _counts(points), plain)
    count = sum(len(point.samples) for point in points)
    return SwapFit(num_samples=count, copies=copies, swapped_out=out, swapped_in=back)


@dataclass(frozen=True, slots=True)
class _Point:
    """All samples of one shape: their medians, and themselves."""

    shape: StepShape
    prepare_ns: float
    device_ns: float
    finish_ns: float | None
    samples: tuple[StepSample, ...]


def _points(samples: Sequence[StepSample]) -> list[_Point]:
    """One point a distinct shape, in order of size."""
    groups: dict[StepShape, list[StepSample]] = {}
    for sample in samples:
        if min(sample.prepare_ns, sample.device_ns, sample.finish_ns or 0) < 0:
            raise ValueError(f"a step cannot take less than no time: {sample}")
        groups.setdefault(sample.shape, []).append(sample)
    points = []
    for shape in sorted(groups, key=_by_size):
        group = groups[shape]
        finish = [sample.finish_ns for sample in group if sample.finish_ns is not None]
        points.append(
            _Point(
                shape,
                median(sample.prepare_ns for sample in group),
                median(sample.device_ns for sample in group),
                median(finish) if finish else None,
                tuple(group),
            )
        )
    return points


def _by_size(shape: StepShape) -> tuple[int, ...]:
    sizes = (int(getattr(shape, name)) for name in RANGE_FIELDS)
    return (shape.padded_tokens, *sizes, int(shape.graph), shape.swapped_out, shape.swapped_in)


def _model(points: Sequence[_Point], provenance: Mapping[str, JsonValue]) -> FittedCost:
    graph = [point for point in points if point.shape.graph]
    eager = [point for point in points if not point.shape.graph]
    return FittedCost(
        Calibration(
            provenance=dict(provenance),
            graph=_mode(graph) if graph else None,
            eager=_mode(eager) if eager else None,
            ranges=_ranges(points),
            held_out=[],
        )
    )


def _mode(points: Sequence[_Point]) -> ModeFit:
    finished = [point for point in points if point.finish_ns is not None]
    knots = _token_knots([point.shape.padded_tokens for point in points])
    tokens = _token_segments([point.shape.padded_tokens for point in points], knots)
    device = _robust_nnls(
        np.hstack([tokens, _terms(points, DEVICE_TERMS)]), [point.device_ns for point in points], _counts(points)
    )
    prepare = _robust_nnls(_terms(points, PREPARE_TERMS), [point.prepare_ns for point in points], _counts(points))
    finish = _robust_nnls(
        _terms(finished, FINISH_TERMS), [point.finish_ns or 0.0 for point in finished], _counts(finished)
    )
    slopes, rest = device[: len(knots)], device[len(knots) :]
    return ModeFit(
        num_samples=sum(len(point.samples) for point in points),
        num_finish_samples=sum(sample.finish_ns is not None for point in points for sample in point.samples),
        tokens=[TokenSlope(above=knot, ns=slope) for knot, slope in zip(knots, slopes, strict=True)],
        device=dict(zip(DEVICE_TERMS, rest, strict=True)),
        prepare=dict(zip(PREPARE_TERMS, prepare, strict=True)),
        finish=dict(zip(FINISH_TERMS, finish, strict=True)),
    )


def _counts(points: Sequence[_Point]) -> list[int]:
    return [len(point.samples) for point in points]


# Features


def _token_knots(sizes: Sequence[int]) -> list[int]:
    """Where the price of a token may change: 0, and measured sizes, each of them at least 1.5 times the one before.

    The last stretch is as long: on a short one, noise would make a slope that larger steps are priced by.
    """
    knots, last = [0], min(sizes)
    for size in sorted(set(sizes)):
        if size >= _KNOT_RATIO * last and max(sizes) >= _KNOT_RATIO * size:
            knots.append(size)
            last = size
    return knots


def _token_segments(sizes: Sequence[int], knots: Sequence[int]) -> Array:
    """[points, knots]: how many tokens of each size lie between a knot and the next one."""
    tokens = np.asarray(sizes, dtype=np.float64)
    columns = [np.clip(tokens - low, 0, high - low) for low, high in pairwise(knots)]
    return np.column_stack([*columns, np.maximum(tokens - knots[-1], 0)])


def _terms(points: Sequence[_Point], names: Sequence[str]) -> Array:
    """[points, names]"""
    return np.column_stack([_term([point.shape for point in points], name) for name in names])


def _term(shapes: Sequence[StepShape], name: str) -> Array:
    if name == "step":
        return np.ones(len(shapes))
    if name == "any_chunk":
        return np.array([float(shape.num_chunks > 0) for shape in shapes])
    return np.array([float(getattr(shape, name)) for shape in shapes])


# Least squares


def _robust_nnls(
    features: Array, times: Sequence[float], counts: Sequence[int], known: Sequence[float] = ()
) -> list[float]:
    """Coefficients >= 0, one a column, that minimise relative errors; far-off times count less and less. `known`: the
    part of each time that is priced already.

    Iteratively reweighted. Errors are relative to the measured times at first, which no large outlier survives, then
    to the fitted ones: relative to measured times alone, noise would make every fit come out low. Beyond 3 spreads
    (median absolute residual, scaled as for a normal distribution) a row's weight falls with the square of its
    residual. No rows: zeros.
    """
    if not len(features):
        return [0.0] * features.shape[1]
    measured = np.asarray(times, dtype=np.float64)
    unit = np.maximum(measured, _FLOOR_NS)
    priced = np.asarray(known, dtype=np.float64) if len(known) else np.zeros(len(measured))
    measured = measured - priced
    weights = np.sqrt(np.asarray(counts, dtype=np.float64))
    solution = _nnls(features * (weights / unit)[:, None], measured * weights / unit)
    for _ in range(_REWEIGHTINGS):
        fitted = features @ solution
        unit = np.maximum(priced + fitted, _FLOOR_NS)
        residual = np.abs(fitted - measured) / unit
        limit = _OUTLIER * 1.4826 * float(np.median(residual))
        if limit < 1e-6:  # more than half of the rows are met exactly
            break
        scale = weights / unit * np.minimum(1.0, limit / np.maximum(residual, limit))
        solution = _nnls(features * scale[:, None], measured * scale)
    return [float(value) for value in solution]


def _nnls(features: Array, target: Array) -> Array:
    """As scipy's, on columns of equal length, and on a square root of their products: the rows may be many."""
    norms = np.linalg.norm(features, axis=0)
    norms[norms == 0] = 1.0
    columns = np.column_stack([features / norms, target])
    # By eigenvalues rather than by Cholesky's method: columns may depend on each other.
    values, vectors = np.linalg.eigh(columns.T @ columns)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    solution, _ = nnls(root[:, :-1], root[:, -1], maxiter=100 * features.shape[1])
    return np.asarray(solution / norms, dtype=np.float64)


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


def _held_out_errors(points: Sequence[_Point]) -> list[HeldOutError]:
    """Every fifth shape is predicted from the other four fifths, five times; its single samples are compared."""
    pairs: dict[tuple[Regime, Part], list[tuple[float, float]]] = {}
    # Shifted by one every five, so that a grid of five contexts a size does not lose the same context everywhere.
    folds = [(index + index // _FOLDS) % _FOLDS for index in range(len(points))]
    for fold in range(_FOLDS):
        train = [point for point, its in zip(points, folds, strict=True) if its != fold]
        model = _model(train, {})
        for point, its in zip(points, folds, strict=True):
            if its == fold:
                _compare(model, point, pairs)
    return [_error(kind, part, pairs[kind, part]) for kind, part in sorted(pairs)]


def _compare(model: FittedCost, point: _Point, pairs: dict[tuple[Regime, Part], list[tuple[float, float]]]) -> None:
    cost, kind = model.cost(point.shape), regime(point.shape)
    for sample in point.samples:
        pairs.setdefault((kind, "device"), []).append((cost.device_ns, sample.device_ns))
        if sample.finish_ns is not None:
            total = sample.prepare_ns + sample.device_ns + sample.finish_ns
            pairs.setdefault((kind, "step"), []).append((cost.total_ns, total))


def _error(kind: Regime, part: Part, pairs: Sequence[tuple[float, float]]) -> HeldOutError:
    predicted, measured = np.array(pairs, dtype=np.float64).T
    errors = np.abs(predicted - measured) / np.maximum(measured, _FLOOR_NS)
    p50, p90 = np.quantile(errors, [0.5, 0.9])
    return HeldOutError(
        regime=kind,
        part=part,
        num_samples=len(pairs),
        mean=float(errors.mean()),
        p50=float(p50),
        p90=float(p90),
        bias=float(predicted.sum() / max(measured.sum(), _FLOOR_NS) - 1),
    )
