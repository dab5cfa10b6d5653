"""What figures draw, thinned to what a screen can show. Shared by every kind of figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart with any kind of colour vision."""

LATENCY_COLUMNS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E"}
"""Columns of `metrics.per_request` -> what a figure calls them."""

STATE_COLUMNS = {"running": "running requests", "waiting": "waiting requests", "kv_blocks": "KV blocks in use"}
"""Columns of `timeline.timeline` -> what a figure calls them."""


def samples(frame: pd.DataFrame, column: str) -> Float64:
    """A latency of the completed requests of a `per_request` frame, ascending, in milliseconds."""
    values = frame.loc[frame["completed"], column].dropna().to_numpy(np.float64)
    return np.sort(values)


def cdf(values: Float64, points: int = 1000) -> tuple[Float64, Float64]:
    """The empirical distribution function of ascending values as steps (x, share of values <= x), from 0 to 1.

    With more values than `points` it goes through that many of them, the smallest and the largest included.
    """
    if not len(values):
        return values, values
    picked = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(np.int64))
    return np.append(values[0], values[picked]), np.append(0.0, (picked + 1) / len(values))


def over_time(frame: pd.DataFrame, column: str, points: int = 500) -> pd.DataFrame:
    """A column of a timeline in at most `points` spans of time.

    Columns: `t_s` (begin of the span, seconds), `mean` over the time of the span, `low` and `high`. A timeline with no
    more rows than that comes back as it is (mean, low and high are the same); the last row closes the last span.
    """
    t_ns, value = frame["t_ns"].to_numpy(), frame[column].to_numpy(np.float64)
    if len(t_ns) <= points:
        return pd.DataFrame({"t_s": t_ns / 1e9, "mean": value, "low": value, "high": value})
    edges = np.unique(np.linspace(t_ns[0], t_ns[-1], points + 1).astype(np.int64))
    at = np.searchsorted(t_ns, edges, side="right") - 1  # the row that holds at each edge
    area = np.concatenate([[0.0], np.cumsum(value[:-1] * np.diff(t_ns))])
    area_at_edges = area[at] + value[at] * (edges - t_ns[at])
    mean = np.diff(area_at_edges) / np.diff(edges)
    # From the row that holds at the begin of a span up to the last one that starts before its end.
    spans = np.stack([at[:-1], np.searchsorted(t_ns, edges[1:], side="left")], axis=1).ravel()
    low, high = np.minimum.reduceat(value, spans)[::2], np.maximum.reduceat(value, spans)[::2]
    close = {"mean": mean, "low": low, "high": high}
    return pd.DataFrame({"t_s": edges / 1e9, **{name: np.append(v, v[-1]) for name, v in close.items()}})


def wide(values: Float64) -> bool:
    """Whether ascending positive values span so much that a logarithmic axis reads better."""
    return bool(len(values) > 1 and values[0] > 0 and values[-1] > 10 * np.median(values))
