"""What prefix caching adds to the host's prepare: steps that name prompts and look them up, beside those without."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from simulator.costs.calibration import LOOKUP_TERMS, LookupFit
from simulator.costs.fitted import FittedCost
from simulator.costs.least_squares import FLOOR_NS, Array, robust_nnls
from simulator.costs.samples import StepSample

MIN_LOOKUPS = 20
"""Steps that name prompts or look them up, fewer of which give no price."""
_FOLDS = 5


def lookups(model: FittedCost, samples: Sequence[StepSample]) -> LookupFit | None:
    """Prices of names and look-ups: what prepare took beyond the model's time for the same steps without. None where
    fewer than MIN_LOOKUPS steps had any."""
    found = [sample for sample in samples if sample.shape.looks_up]
    if len(found) < MIN_LOOKUPS:
        return None
    sizes = np.array([[getattr(sample.shape, name) for name in LOOKUP_TERMS] for sample in found], np.float64)
    taken = np.array([sample.prepare_ns for sample in found], np.float64)
    plain = _typical(model, samples) * np.array([model.cost(sample.shape).prepare_ns for sample in found], np.float64)
    predicted = np.zeros(len(found))
    for fold in range(_FOLDS):
        its = np.arange(len(found)) % _FOLDS == fold
        predicted[its] = sizes[its] @ np.array(_prices(sizes[~its], taken[~its], plain[~its]))
    prices = dict(zip(LOOKUP_TERMS, _prices(sizes, taken, plain), strict=True))
    return LookupFit(
        num_samples=len(found),
        **prices,
        held_out=_error(plain + predicted, taken),
        without=_error(plain, taken),
    )


def _typical(model: FittedCost, samples: Sequence[StepSample]) -> float:
    """What prepare usually takes of the model's time for it, which has the rare long delays of a server in its mean."""
    others = [sample for sample in samples if sample.shape.num_chunks and not sample.shape.looks_up]
    return median(sample.prepare_ns / max(1, model.cost(sample.shape).prepare_ns) for sample in others) if others else 1


def _prices(sizes: Array, taken: Array, plain: Array) -> list[float]:
    return robust_nnls(sizes, taken.tolist(), [1] * len(taken), plain.tolist())


def _error(predicted: Array, measured: Array) -> float:
    return float(np.mean(np.abs(predicted - measured) / np.maximum(measured, FLOOR_NS)))
