"""A run as a row of figures: of all its requests, or of those that arrived within a window.

Within a window latencies, goodput and counts are those of the requests that arrived in it, whenever they ended. Rates
are what happened between the first arrival of the window and the first one after it, whoever it happened to: in a
steady state as much as arrives. Fairness is among the window's requests, KV blocks are averaged over its time. Service
gaps, tenants' service differences, programs and clients' retries are those of the whole run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.metrics import (
    COMPLETED,
    LATENCIES,
    STATUSES,
    latencies_ms,
    meets,
    outline,
    own_slos,
    per_request,
    statistics,
    summarize,
    time_average,
    timeline,
    token_times,
)
from experiments.records import Run
from experiments.study import shares
from experiments.sweeps.spec import Measure, Window
from experiments.timeline import window as part_of

MANY_TOKENS = 10_000_000
"""Output tokens of a run beyond which they are not looked at one by one: it would take more than a gigabyte."""


def measured(run: Run, measure: Measure) -> dict[str, float | int | None]:
    """Every figure that is one number, by the keys of `metrics.summarize`, with those of `study.OBJECTIVES`.

    Counts of statuses are `num_<status>`. Of runs of more than `MANY_TOKENS` those that `metrics.outline` has; such a
    run has no window. Raises RunError for records that contradict themselves, ValueError for a window all the same.
    """
    if int(run.columns("requests", ["output_tokens"])["output_tokens"].to_numpy().sum()) > MANY_TOKENS:
        if not measure.window.whole:
            raise ValueError(f"a window needs every token's time, and this run has more than {MANY_TOKENS:,}")
        return _flat(outline(run))
    summary = summarize(run, measure.slo or None)
    frame = per_request(run)
    if not measure.window.whole and len(frame):
        kept = _kept(frame, measure.window)
        frame, after = frame.loc[kept.index].sort_index(), _after(run, frame, measure.window)
        summary |= _within(run, frame, round(1e9 * kept["arrival_s"].iloc[0]), after, measure)
    return _flat({**summary, **shares(run, frame, summary["mean_kv_blocks"])})


def bounds(count: int, window: Window) -> tuple[int, int]:
    """The first place in order of arrival that counts, and the first one after."""
    first = int(window.skip_first * count)
    return first, max(first + 1, count - int(window.skip_last * count))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `per_request` by arrival."""
    return frame.sort_values(["arrival_s", "request_id"], kind="stable")


def in_window(frame: pd.DataFrame, window: Window) -> pd.DataFrame:
    """The rows of `per_request` that a window lets count."""
    return frame if window.whole or not len(frame) else frame.loc[_kept(frame, window).index].sort_index()


def _kept(frame: pd.DataFrame, window: Window) -> pd.DataFrame:
    first, last = bounds(len(frame), window)
    return in_order(frame).iloc[first:last]


def _after(run: Run, frame: pd.DataFrame, window: Window) -> int:
    """When the window ends, in nanoseconds: with the first arrival after it, else with the run."""
    _, last = bounds(len(frame), window)
    if last < len(frame):
        return round(1e9 * in_order(frame)["arrival_s"].iloc[last])
    return int(run.requests[["finish_ns", "arrival_ns"]].max().max()) + 1


def _within(run: Run, frame: pd.DataFrame, begin: int, end: int, measure: Measure) -> dict[str, Any]:
    """The figures of a summary that a window changes. `frame`: the rows of `per_request` that count."""
    ids = frame["request_id"].to_numpy()
    requests = run.requests
    chosen = requests[requests["request_id"].isin(ids)]
    done = frame[frame["completed"]]
    duration = (end - begin) / 1e9
    ended = requests["status"].isin(COMPLETED) & requests["finish_ns"].between(begin, end, inclusive="left")
    times = token_times(run).times_ns
    tokens = int(((times >= begin) & (times < end)).sum())
    prompts = int(requests.loc[requests["first_token_ns"].between(begin, end, inclusive="left"), "prompt_tokens"].sum())
    cached, prompt = int(done["cached_tokens"].sum()), int(done["prompt_tokens"].sum())
    found: dict[str, Any] = {
        "num_prompts": len(frame),
        "duration": duration,
        "completed": len(done),
        "failed": len(frame) - len(done),
        "statuses": {status: int((chosen["status"] == status).sum()) for status in STATUSES},
        "total_input_tokens": prompt,
        "total_output_tokens": int(done["output_tokens"].sum()),
        "request_throughput": _rate(int(ended.sum()), duration),
        "output_throughput": _rate(tokens, duration),
        "total_token_throughput": _rate(tokens + prompts, duration),
        "cached_token_share": cached / prompt if prompt and (run.has_steps or cached) else None,
        **own_slos(chosen, frame, duration),
    }
    if run.has_steps:
        states = part_of(timeline(run), begin, end)
        mean = time_average(states, "kv_blocks")
        found["preemptions"] = int(chosen["preemptions"].sum())
        found["mean_kv_blocks"] = None if np.isnan(mean) else mean
        found["max_kv_blocks"] = int(states["kv_blocks"].max()) if len(states) else None
    if measure.slo:
        found["request_goodput"] = _rate(int(meets(done, measure.slo).sum()), duration)
    samples = latencies_ms(run, ids)
    for name in LATENCIES:
        found |= statistics(name, samples[name])
    return found | statistics("queue", done["queue_ms"].dropna().to_numpy())


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _flat(summary: dict[str, Any]) -> dict[str, float | int | None]:
    statuses = {f"num_{status}": count for status, count in summary.get("statuses", {}).items()}
    numbers = {
        name: value for name, value in summary.items() if value is None or isinstance(value, int | float)
    }  # also flags: whether a policy was clairvoyant
    return {**numbers, **statuses}
