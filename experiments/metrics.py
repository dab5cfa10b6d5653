"""Metrics of a run, from its records only, with the definitions and JSON keys of `vllm bench serve`.

TTFT    first token - arrival
TPOT    (E2E - TTFT) / (output tokens - 1), of requests with more than one
ITL     gaps between a request's tokens, pooled over the requests
E2E     end - arrival (key `e2el`)
goodput requests that meet every objective, a second

As there, latencies and throughput are those of completed requests (status `stop` or `length`); the others are counted.
A client's run has chunks for tokens, and knows nothing of queues, memory and preemptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.backlog import ServiceGap, largest_gap
from experiments.economy import economy
from experiments.fairness import jain_index, service_difference, service_received
from experiments.programs import client_figures, program_samples_ms
from experiments.records import Run
from experiments.records.reader import to_pandas
from experiments.timeline import LittlesLaw, littles_law, time_average, timeline
from experiments.token_times import COMPLETED, TokenTimes, token_times
from policies.records import ALIVE

__all__ = [
    "COLUMNS",
    "COMPLETED",
    "LATENCIES",
    "LittlesLaw",
    "ServiceGap",
    "TokenTimes",
    "goodput",
    "jain_index",
    "largest_gap",
    "latencies_ms",
    "littles_law",
    "meets",
    "outline",
    "own_slos",
    "per_request",
    "service_difference",
    "service_received",
    "summarize",
    "time_average",
    "timeline",
    "token_times",
]

LATENCIES = ("ttft", "tpot", "itl", "e2el")
"""Names of the latencies, as `vllm bench serve` has them."""

STATUSES = (*COMPLETED, "cancelled", "dropped", "refused", "failed", "unfinished")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
COLUMNS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}
"""Latency -> its column of `per_request`."""

Float64 = NDArray[np.float64]


def per_request(run: Run) -> pd.DataFrame:
    """One row a request, in order of request_id.

    Columns: request_id, replica, tenant, session, priority, status, completed (bool), arrival_s, prompt_tokens,
    output_tokens, cached_tokens, fetched_tokens (part of those), disk_tokens (part of those), preemptions, and in
    milliseconds queue_ms (to the first plan that ran it), ttft_ms, tpot_ms, e2e_ms. What a request did not get to is
    nan; tpot_ms and e2e_ms are those of completed requests alone.
    """
    requests = run.requests
    kept = ["request_id", "replica", "tenant", "session", "priority", "status"]
    counts = ["prompt_tokens", "output_tokens", "cached_tokens", "fetched_tokens", "disk_tokens", "preemptions"]
    arrival = requests["arrival_ns"].to_numpy()
    completed = requests["status"].isin(COMPLETED).to_numpy()
    first = _since(arrival, requests["first_token_ns"])
    end = np.where(completed, _since(arrival, requests["finish_ns"]), np.nan)
    output = requests["output_tokens"].to_numpy()
    frame = requests[kept].assign(completed=completed, arrival_s=arrival / 1e9)
    frame[counts] = requests[counts]
    frame["queue_ms"] = _since(arrival, requests["first_scheduled_ns"])
    frame["ttft_ms"] = first
    frame["tpot_ms"] = np.where(output > 1, (end - first) / np.maximum(output - 1, 1), np.nan)
    frame["e2e_ms"] = end
    return frame.sort_values("request_id", kind="stable", ignore_index=True)


def latencies_ms(run: Run, request_ids: NDArray[np.int64] | None = None) -> dict[str, Float64]:
    """The samples behind each latency, in milliseconds: of the completed requests, or of those among `request_ids`."""
    frame = per_request(run)
    chosen = frame["completed"].to_numpy()
    rows = run.requests["status"].isin(COMPLETED).to_numpy()
    if request_ids is not None:
        chosen = chosen & frame["request_id"].isin(request_ids).to_numpy()
        rows = rows & run.requests["request_id"].isin(request_ids).to_numpy()
    samples = {name: frame[column].to_numpy()[chosen] for name, column in COLUMNS.items()}
    samples["itl"] = token_times(run).gaps_ns(rows) / 1e6
    return {name: samples[name][~np.isnan(samples[name])] for name in LATENCIES}


def summarize(
    run: Run, slo: Mapping[str, float] | None = None, percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """A run in figures, under the JSON keys of `vllm bench serve` where it has one.

    Args:
        slo: objectives in milliseconds, some of `ttft`, `tpot`, `e2el` (as `--goodput` takes them), for all requests.
        percentiles: which pNN_*_ms to give.

    `largest_service_gap` is that of `experiments.backlog`, in weighted tokens, None where no two tenants ever waited at
    once. `slo_attainment` and `slo_goodput` go by the objectives that requests came with. Where programs have several
    calls, `programs` counts those whose calls all completed, and `mean_program_ms` and so on are their times
    (`experiments.programs`). Where clients have time-outs, `retries` are the tries beyond first ones, `answered` counts
    the requests whose last try completed, and `mean_answer_ms` and so on are what those took from the first try on; all
    other figures count each try as a request. `duration` (seconds) runs from the first arrival to the last end. What
    there is nothing to compute from is None.
    Of simulations there are the figures of `experiments.economy` too: `replica_seconds`, and what tokens are estimated
    to cost in energy and money.
    Raises ValueError for an unknown objective, RunError for records that contradict themselves.
    """
    requests, frame = run.requests, per_request(run)
    done = frame[frame["completed"]]
    samples = latencies_ms(run)
    duration = _duration_s(run)
    output, prompt = int(done["output_tokens"].sum()), int(done["prompt_tokens"].sum())
    statuses = _statuses(run)
    num_prompts = sum(statuses.values())
    summary: dict[str, Any] = {
        "run": run.name,
        "kind": run.kind,
        "complete": run.complete,
        "clairvoyant": run.clairvoyant,
        "num_prompts": num_prompts,
        "duration": duration,
        "completed": len(done),
        "failed": num_prompts - len(done),
        "statuses": statuses,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": _rate(len(done), duration),
        "output_throughput": _rate(output, duration),
        "total_token_throughput": _rate(prompt + output, duration),
        **_peaks(run),
    }
    if slo is not None:
        summary["slo_ms"] = dict(slo)
        summary["request_goodput"] = goodput(run, slo)
    summary |= own_slos(requests, frame, duration)
    for name in LATENCIES:
        summary |= statistics(name, samples[name], percentiles)
    summary |= statistics("queue", done["queue_ms"].dropna().to_numpy(), percentiles)
    cached = int(done["cached_tokens"].sum())
    known = run.has_steps or cached > 0  # many a server does not say what it found in its prefix cache
    summary["cached_token_share"] = cached / prompt if prompt and known else None
    fetched = int(done["fetched_tokens"].sum())  # part of those that are cached
    summary["fetched_token_share"] = fetched / prompt if prompt and known else None
    from_disk = int(done["disk_tokens"].sum())  # part of those that are fetched
    summary["disk_token_share"] = from_disk / prompt if prompt and known else None
    summary["preemptions"] = int(requests["preemptions"].sum()) if run.has_steps else None
    gap = largest_gap(run)
    summary["largest_service_gap"] = None if gap is None else gap.service
    programs = program_samples_ms(run)
    if programs is not None:
        summary |= {"programs": len(programs), **statistics("program", programs, percentiles)}
    clients = client_figures(run)
    if clients is not None:
        retries, answered, took = clients
        summary |= {"retries": retries, "answered": answered, **statistics("answer", took, percentiles)}
    return summary | economy(run, output) | _memory(run)


def outline(run: Run, percentiles: Sequence[float] = PERCENTILES) -> dict[str, Any]:
    """The figures of `summarize` that need a few columns of the requests alone: for runs of millions of requests, whose
    tokens one by one do not fit in memory. Gaps between tokens (ITL) are None."""
    names = ["arrival_ns", "first_token_ns", "finish_ns", "output_tokens", "preemptions", "status"]
    requests = to_pandas(run.columns("requests", names))
    done = requests[requests["status"].isin(COMPLETED)]
    arrival, output = done["arrival_ns"].to_numpy(), done["output_tokens"].to_numpy()
    ttft, e2e = _since(arrival, done["first_token_ns"]), _since(arrival, done["finish_ns"])
    tpot = (e2e - ttft)[output > 1] / (output[output > 1] - 1)
    ends = requests["finish_ns"].dropna()
    duration = (int(ends.max()) - int(requests["arrival_ns"].min())) / 1e9 if len(ends) else 0.0
    figures: dict[str, Any] = {
        "statuses": {status: int((requests["status"] == status).sum()) for status in STATUSES},
        "total_output_tokens": int(output.sum()),
        "request_throughput": _rate(len(done), duration),
        "output_throughput": _rate(int(output.sum()), duration),
        "preemptions": int(requests["preemptions"].sum()) if run.has_steps else None,
    }
    for name, samples in (("ttft", ttft), ("tpot", tpot), ("itl", np.empty(0)), ("e2el", e2e)):
        figures |= statistics(name, samples, percentiles)
    return figures


def goodput(run: Run, slo: Mapping[str, float]) -> float:
    """Completed requests a second that meet every objective, as `summarize` has them. Raises ValueError for others."""
    frame = per_request(run)
    return _rate(int(meets(frame[frame["completed"]], slo).sum()), _duration_s(run))


def statistics(name: str, samples_ms: Float64, percentiles: Sequence[float] = PERCENTILES) -> dict[str, float | None]:
    """mean, median, std and pNN of samples, as `mean_ttft_ms` and so on; None without samples."""
    some = len(samples_ms) > 0
    found: dict[str, float | None] = {
        f"mean_{name}_ms": float(np.mean(samples_ms)) if some else None,
        f"median_{name}_ms": float(np.median(samples_ms)) if some else None,
        f"std_{name}_ms": float(np.std(samples_ms)) if some else None,
    }
    for percentile, value in zip(percentiles, np.percentile(samples_ms, percentiles) if some else (), strict=False):
        found[f"p{percentile:g}_{name}_ms"] = float(value)
    return found if some else found | {f"p{p:g}_{name}_ms": None for p in percentiles}


def _since(arrival_ns: NDArray[np.int64], times: pd.Series[Any]) -> Float64:
    """Milliseconds from the arrivals to times that may be missing (nan). Subtracted as integers: nothing is rounded."""
    passed = (times.to_numpy(np.int64, na_value=0) - arrival_ns) / 1e6
    return np.where(times.isna().to_numpy(), np.nan, passed)


def _duration_s(run: Run) -> float:
    requests = run.requests
    if not len(requests):
        return 0.0
    ended = requests["finish_ns"].dropna()
    ends = [int(ended.max())] if len(ended) else []
    if run.has_steps and (not run.complete or (requests["status"] == "unfinished").any()):
        ends += [int(run.steps["end_ns"].max())] if len(run.steps) else []
    begin = int(requests["arrival_ns"].min())
    return (max([begin, *ends]) - begin) / 1e9


def _statuses(run: Run) -> dict[str, int]:
    """Requests by status. Of a run that died, those still alive by its last steps count as unfinished."""
    counts = {status: int((run.requests["status"] == status).sum()) for status in STATUSES}
    if run.has_steps and not run.complete and not counts["unfinished"]:  # an orderly end has recorded them
        lag = int(run.limits.get("lag", 0))
        for _, rows in run.steps.groupby("replica"):
            last = rows.sort_values("step").tail(1 + lag)
            alive = int(last[list(ALIVE)].iloc[-1].sum())
            counts["unfinished"] += max(0, alive - int(last["num_finished"].sum()))
    return counts


def meets(done: pd.DataFrame, slo: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which completed requests (rows of `per_request`) meet every objective. One of one token has no TPOT to miss.

    Raises ValueError for an unknown objective.
    """
    met = np.ones(len(done), bool)
    for name, limit in slo.items():
        if name not in COLUMNS:
            raise ValueError(f"there is no objective {name!r}; give some of {', '.join(COLUMNS)} in milliseconds")
        met &= done[COLUMNS[name]].fillna(0.0).to_numpy() <= limit
    return met


def own_slos(requests: pd.DataFrame, frame: pd.DataFrame, duration_s: float) -> dict[str, float | None]:
    """How many of the requests that came with objectives completed within them: as a share, and a second.

    A request whose TTFT or TPOT is missing because it did not get to it has missed it; one of one token has no TPOT.
    """
    own = requests.sort_values("request_id", kind="stable")
    asked = own["slo_value"].notna().to_numpy()
    if not asked.any():
        return {"slo_attainment": None, "slo_goodput": None}
    met = asked & frame["completed"].to_numpy()
    for objective, column in (("slo_ttft_ns", "ttft_ms"), ("slo_tpot_ns", "tpot_ms"), ("slo_e2e_ns", "e2e_ms")):
        limit = own[objective].to_numpy(np.float64, na_value=np.inf) / 1e6
        missing = np.where((column == "tpot_ms") & (own["output_tokens"].to_numpy() <= 1), 0.0, np.inf)
        met &= (frame[column].fillna(np.inf).to_numpy() <= limit) | (missing <= limit)
    return {"slo_attainment": float(met.sum() / asked.sum()), "slo_goodput": _rate(int(met.sum()), duration_s)}


def _peaks(run: Run) -> dict[str, float]:
    """The peaks that `vllm bench serve` gives, over whole seconds from the first arrival."""
    requests, times = run.requests, token_times(run)
    done = requests["status"].isin(COMPLETED).to_numpy()
    if not done.any():
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    begin = int(requests["arrival_ns"].min())
    of_done = np.repeat(done, times.counts)
    seconds = (times.times_ns[of_done] - begin) // 1_000_000_000
    first = (requests["arrival_ns"].to_numpy()[done] - begin) // 1_000_000_000
    last = (requests["finish_ns"].to_numpy(np.int64, na_value=begin)[done] - begin) // 1_000_000_000
    size = int(last.max()) + 2
    present = np.cumsum(np.bincount(first, minlength=size) - np.bincount(last + 1, minlength=size))
    return {
        "max_output_tokens_per_s": float(np.bincount(seconds).max()) if len(seconds) else 0.0,
        "max_concurrent_requests": int(present.max()),
    }


_BLOCKS_MOVED = {
    "swapped_blocks_out": "swapped_out",
    "swapped_blocks_in": "swapped_in",
    "offloaded_blocks": "offloaded",
    "fetched_blocks": "fetched",
    "disk_blocks_out": "disk_out",
    "disk_blocks_in": "disk_in",
}
_COPY_TIMES = {"copy_out_ms": "copy_out_ns", "copy_in_ms": "copy_in_ns", "copy_wait_ms": "copy_wait_ns"}


def _memory(run: Run) -> dict[str, float | int | None]:
    if not run.has_steps:
        return dict.fromkeys(
            ("mean_kv_blocks", "max_kv_blocks", *_BLOCKS_MOVED, "disk_blocks_lost", *_COPY_TIMES, "steps")
        )
    frame, size = timeline(run), int(run.limits.get("block_size", 1))
    tokens = {name: int(run.steps[name].sum()) for name in _BLOCKS_MOVED.values()}
    tokens["swapped_out"] -= tokens["offloaded"]
    tokens["swapped_in"] -= tokens["fetched"]
    mean = time_average(frame, "kv_blocks")
    return {
        "mean_kv_blocks": None if np.isnan(mean) else mean,
        "max_kv_blocks": int(frame["kv_blocks"].max()) if len(frame) else None,
        **{name: tokens[of] // size for name, of in _BLOCKS_MOVED.items()},
        "disk_blocks_lost": int(run.steps["disk_dropped"].sum()),
        **{name: int(run.steps[of].sum()) / 1e6 for name, of in _COPY_TIMES.items()},
        "steps": int((run.steps["padded_tokens"] > 0).sum()),
    }


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s else 0.0
