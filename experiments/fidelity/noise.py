"""How far apart two policies' figures must be for the difference to be more than the luck of the requests drawn.

A paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): both policies served the same
requests, so requests are drawn with replacement, the same ones for both, and the figures' difference is taken again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.metrics import COLUMNS

DRAWS, LEVEL = 1000, 0.95


def half_widths(frames: Mapping[str, pd.DataFrame], figure: str) -> dict[tuple[str, str], float]:
    """(policy, policy) -> half of the width, in milliseconds, of the interval that holds 95% of the drawn differences.

    `frames`: policy -> `metrics.per_request` of its run. `figure`: mean_ttft, p99_tpot, ... Of the requests that have
    the latency under every policy; infinite where there is none.
    """
    statistic, _, latency = figure.partition("_")
    columns = {
        policy: frame.loc[frame["completed"], ["request_id", COLUMNS[latency]]].set_index("request_id")
        for policy, frame in frames.items()
    }
    samples = pd.concat(columns, axis=1, join="inner").dropna().to_numpy()  # [requests, policies]
    if not len(samples):
        return dict.fromkeys(combinations(frames, 2), float("inf"))
    drawn = np.random.default_rng(0).integers(0, len(samples), (DRAWS, len(samples)))
    figures = np.stack([_figure(column[drawn], statistic) for column in samples.T])  # [policies, draws]
    found = {}
    for (i, one), (j, two) in combinations(enumerate(frames), 2):
        low, high = np.quantile(figures[i] - figures[j], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[one, two] = float(high - low) / 2
    return found


def _figure(values: NDArray[np.float64], statistic: str) -> NDArray[np.float64]:
    """Of each draw, a row."""
    return values.mean(axis=1) if statistic == "mean" else np.quantile(values, float(statistic[1:]) / 100, axis=1)
