"""Non-negative least squares on relative errors, robust against a few far-off times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]

FLOOR_NS = 100_000.0
"""Below a tenth of a millisecond an error counts as if the time were that: what is as short as the host's jitter would
weigh more than all else."""
_REWEIGHTINGS = 8
_OUTLIER = 3.0  # spreads beyond which a sample's influence falls


def robust_nnls(
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
    unit = np.maximum(measured, FLOOR_NS)
    priced = np.asarray(known, dtype=np.float64) if len(known) else np.zeros(len(measured))
    measured = measured - priced
    weights = np.sqrt(np.asarray(counts, dtype=np.float64))
    solution = _nnls(features * (weights / unit)[:, None], measured * weights / unit)
    for _ in range(_REWEIGHTINGS):
        fitted = features @ solution
        unit = np.maximum(priced + fitted, FLOOR_NS)
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
    empty = norms == 0
    norms[empty] = 1.0
    columns = np.column_stack([features / norms, target])
    # By eigenvalues rather than by Cholesky's method: columns may depend on each other.
    values, vectors = np.linalg.eigh(columns.T @ columns)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    solution, _ = nnls(root[:, :-1], root[:, -1], maxiter=100 * features.shape[1])
    # Rounding leaves traces in an empty column, which would be divided by traces.
    return np.asarray(np.where(empty, 0.0, solution / norms), dtype=np.float64)
