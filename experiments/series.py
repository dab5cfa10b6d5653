"""What figures draw, thinned to what a screen can show. Shared by every kind of figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart with any kind of colour vision."""

STEP_COLOURS = {"decode": "#56B4E9", "mixed": "#E69F00", "prefill": "#CC79A7", "idle": "rgba(128,134,146,0.16)"}
"""Kinds of `composition.composition` -> colours that read on a light and on a dark page."""

PHASE_COLOURS = {
    "waiting": "#9AA4B2",
    "prefill": "#CC79A7",
    "decode": "#56B4E9",
    "paused": "#E69F00",
    "moving": "#009E73",
}
"""Phases of `life.Life` -> colours; a phase has that of the steps that do it."""

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


def quantile_differences(a: Float64, b: Float64) -> tuple[Float64, Float64]:
    """How far b's percentiles are from a's, relative to a's: (percentiles 1..99, (b - a) / a). Empty without samples.

    Both ascending. Where a's percentile is 0 there is no relative difference: those are left out.
    """
    if not len(a) or not len(b):
        return np.zeros(0), np.zeros(0)
    percentiles = np.arange(1.0, 100.0)
    of_a, of_b = np.percentile(a, percentiles), np.percentile(b, percentiles)
    some = of_a > 0
    return percentiles[some], (of_b[some] - of_a[some]) / of_a[some]


def matched(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two `per_request` frames, of each the requests that both runs completed: those that `compare` compares."""
    done_a, done_b = a[a["completed"]], b[b["completed"]]
    return (
        done_a[done_a["request_id"].isin(done_b["request_id"])],
        done_b[done_b["request_id"].isin(done_a["request_id"])],
    )


def request_pairs(a: pd.DataFrame, b: pd.DataFrame, column: str) -> pd.DataFrame:
    """A latency of each request in both runs (`per_request` frames), the largest difference first.

    Columns: request_id, prompt_tokens, output_tokens (run a's), `a`, `b` and `difference` (b - a) in milliseconds.
    """
    wanted = ["request_id", column]
    left, right = a.loc[a["completed"], [*wanted, "prompt_tokens", "output_tokens"]], b.loc[b["completed"], wanted]
    both = left.merge(right, on="request_id", suffixes=("_a", "_b")).dropna(subset=[f"{column}_a", f"{column}_b"])
    both = both.rename(columns={f"{column}_a": "a", f"{column}_b": "b"})
    both["difference"] = both["b"] - both["a"]
    order = np.lexsort([both["request_id"].to_numpy(), -both["difference"].abs().to_numpy()])
    return both.iloc[order].reset_index(drop=True)[
        ["request_id", "prompt_tokens", "output_tokens", "a", "b", "difference"]
    ]


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
