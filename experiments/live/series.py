"""The last seconds of a live server and of its twin as curves over the same points of time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.live.watch import Fate, Watch

POINTS = 121
SMOOTHED_OVER = 12
"""Throughput and percentiles at a point are those of the part of the window before it, one in so many."""

Float64 = NDArray[np.float64]

STATES = ("running", "waiting", "kv_share")
COLUMNS = ("tokens_per_s", *STATES, "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
"""Of a frame: output tokens a second, requests, percent of KV blocks, milliseconds."""

PANELS: dict[str, tuple[str, ...]] = {
    "output tokens (tok/s)": ("tokens_per_s",),
    "running requests": ("running",),
    "waiting requests": ("waiting",),
    "KV blocks in use (%)": ("kv_share",),
    "TTFT, p50 and p99 (ms)": ("ttft_p50", "ttft_p99"),
    "TPOT, p50 and p99 (ms)": ("tpot_p50", "tpot_p99"),
}
"""Titles of axes -> the columns that they show."""
ERRORS = ("TTFT", "TPOT", "E2E")


def recent(watch: Watch, window_s: float) -> dict[str, pd.DataFrame]:
    """`server` and `twin`: `t_s`, seconds before now (so none is above 0), and `COLUMNS`.

    nan where nothing is known: before the first poll, after the point that the twin has come to, without a request.
    """
    span = round(window_s * 1e9)
    times = watch.now_ns - span + np.linspace(0, span, POINTS).round().astype(np.int64)
    smoothed = span // SMOOTHED_OVER
    server = _server(watch, times, smoothed) | _latencies(watch.server_fates.values(), times, smoothed)
    twin = _twin(watch, times, smoothed) | _latencies(watch.twin_fates.values(), times, smoothed)
    known = times <= watch.twin.now_ns
    t_s = (times - watch.now_ns) / 1e9
    return {
        "server": pd.DataFrame({"t_s": t_s, **server}),
        "twin": pd.DataFrame({"t_s": t_s, **{name: np.where(known, values, np.nan) for name, values in twin.items()}}),
    }


def errors(watch: Watch, window_s: float) -> pd.DataFrame:
    """How the error of the means over all requests done so far has gone: `t_s`, and a column a latency, in percent."""
    since = watch.now_ns - window_s * 1e9
    rows = [
        {"t_s": (at - watch.now_ns) / 1e9, **{name.removeprefix("mean "): 100 * error for name, error in found.items()}}
        for at, found in watch.errors
        if at >= since
    ]
    return pd.DataFrame(rows, columns=["t_s", *ERRORS])


def _server(watch: Watch, times: NDArray[np.int64], smoothed: int) -> dict[str, Float64]:
    """From the polls: counters in between by a straight line, gauges as they were at the poll before."""
    samples = watch.samples
    at = np.array([sample.at_ns for sample in samples], np.int64)
    if not len(at):
        return dict.fromkeys(("tokens_per_s", *STATES), np.full(len(times), np.nan))
    tokens = np.array([sample.output_tokens for sample in samples], np.float64)
    since = np.maximum(times - smoothed, at[0])
    rate = _rate(np.interp(times, at, tokens) - np.interp(since, at, tokens), times - since)
    gauges = {name: _held(at, np.array([getattr(s, name) for s in samples], np.float64), times) for name in STATES}
    return {"tokens_per_s": np.where(times > at[0], rate, np.nan), **gauges}


def _twin(watch: Watch, times: NDArray[np.int64], smoothed: int) -> dict[str, Float64]:
    """From the twin's steps, summed over its replicas."""
    steps, num_blocks = watch.twin.steps(), watch.twin.limits.num_blocks
    sums = {name: np.zeros(len(times)) for name in STATES}
    for replica in np.unique(steps["replica"]):
        of = steps["replica"] == replica
        at = steps["plan_ns"][of]
        used = 100 * (1 - (steps["free_blocks"][of] + steps["idle_blocks"][of]) / num_blocks) / watch.replicas
        for name, values in (
            ("running", steps["num_running"][of]),
            ("waiting", steps["num_waiting"][of]),
            ("kv_share", used),
        ):
            sums[name] += np.nan_to_num(_held(at, values.astype(np.float64), times))
    order = np.argsort(steps["end_ns"], kind="stable")
    ends, count = steps["end_ns"][order], np.concatenate([[0], np.cumsum(steps["num_samples"][order])])
    made = (
        count[np.searchsorted(ends, times, side="right")] - count[np.searchsorted(ends, times - smoothed, side="right")]
    )
    rate = _rate(made.astype(np.float64), np.full(len(times), smoothed))
    began = times >= (int(steps["plan_ns"].min()) if len(steps["plan_ns"]) else np.iinfo(np.int64).max)
    return {name: np.where(began, values, np.nan) for name, values in {"tokens_per_s": rate, **sums}.items()}


def _latencies(fates: Iterable[Fate], times: NDArray[np.int64], smoothed: int) -> dict[str, Float64]:
    """TTFT of those whose first token came in the part before each point, TPOT of those that ended in it."""
    known = list(fates)
    firsts = np.array([fate.first_token_ns for fate in known], np.int64)
    ends = np.array([fate.end_ns for fate in known], np.int64)
    ttft = np.array([fate.ttft_ms for fate in known], np.float64)
    tpot = np.array([fate.tpot_ms for fate in known], np.float64)
    some = ~np.isnan(tpot)
    return {
        f"{name}_p{percentile}": _rolling(at, values, times, smoothed, percentile)
        for name, at, values in (("ttft", firsts, ttft), ("tpot", ends[some], tpot[some]))
        for percentile in (50, 99)
    }


def _rolling(
    at: NDArray[np.int64], values: Float64, times: NDArray[np.int64], smoothed: int, percentile: int
) -> Float64:
    order = np.argsort(at, kind="stable")
    at, values = at[order], values[order]
    low, high = np.searchsorted(at, times - smoothed, side="right"), np.searchsorted(at, times, side="right")
    return np.array(
        [np.percentile(values[a:b], percentile) if b > a else np.nan for a, b in zip(low, high, strict=True)]
    )


def _held(at: NDArray[np.int64], values: Float64, times: NDArray[np.int64]) -> Float64:
    """The value that holds at each time; nan before the first."""
    place = np.searchsorted(at, times, side="right") - 1
    return np.where(place >= 0, values[np.maximum(place, 0)], np.nan) if len(at) else np.full(len(times), np.nan)


def _rate(count: Float64, span_ns: NDArray[np.int64]) -> Float64:
    return count / np.maximum(span_ns, 1) * 1e9
