"""A trace in figures, as its file has it: before anything is dropped because it cannot be served."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.workloads.client_statistics import describe_clients
from experiments.workloads.describing_others import describe_other
from experiments.workloads.lines import open_text
from experiments.workloads.loaders import OWN_FORMAT, detect, ragpulse, read_rows
from experiments.workloads.loaders.rows import TraceRows
from experiments.workloads.prefix_sharing import CAPACITIES, PrefixSharing
from experiments.workloads.request import Workload
from experiments.workloads.stats import NS_PER_S, arrival_stats, length_stats

Tell = Callable[[int], object]
Int64 = NDArray[np.int64]


def describe_file(
    path: str | Path, format: str = "auto", *, capacities: Sequence[int] = CAPACITIES, tell: Tell | None = None
) -> dict[str, Any]:
    """`describe` of a file of any known format; of an archive of clients' statistics, `describe_clients`.

    `tell`: called with the number of requests looked at for prefixes.
    """
    if format == "auto" and (found := _no_trace(path)) is not None:
        return found
    name = detect(path) if format == "auto" else format
    if name == OWN_FORMAT:
        return describe(rows_of(Workload.from_jsonl(path)), capacities=capacities, tell=tell)
    found = describe(read_rows(path, name), capacities=capacities, tell=tell)
    if name == ragpulse.NAME:
        found["chunks"] = ragpulse.chunk_sharing(path)
    return found


def _no_trace(path: str | Path) -> dict[str, Any] | None:
    """Of files that hold no requests one by one; None for a trace."""
    if not Path(path).is_file():
        return None  # reading it as a trace says what is wrong
    if tarfile.is_tarfile(path):
        return describe_clients(path)
    with open_text(path) as file:
        try:
            start = file.read(1)
        except (OSError, EOFError, UnicodeDecodeError):
            return None
    return describe_other(path) if start == "{" else None


def describe(rows: TraceRows, *, capacities: Sequence[int] = CAPACITIES, tell: Tell | None = None) -> dict[str, Any]:
    """What there is to say of a trace; None for what it does not have.

    `tokens`: mean and percentiles of `input` and `output`, and their rank correlation. `arrivals`: see `_arrivals`.
    `tenants`, `sessions`: how many and how unequal. `prefixes`: see `prefix_sharing`.
    """
    inputs, outputs = np.array(rows.prompt_tokens), np.array(rows.output_tokens)
    timed = rows.has_arrivals and rows.one_clock and len(inputs) > 0
    return {
        "format": rows.format,
        "requests": len(inputs),
        "not_servable": int(np.sum((inputs < 1) | (outputs < 1))),
        "tokens": {
            "input": length_stats(inputs),
            "output": length_stats(outputs),
            "rank_correlation": _rank_correlation(inputs, outputs),
        },
        "arrivals": _arrivals(np.sort(np.array(rows.arrival_ns, np.int64))) if timed else None,
        "tenants": None if rows.tenant is None else _tenants(rows.tenant),
        "sessions": None if rows.session is None else _sessions(rows, inputs),
        "prefixes": None if rows.hash_ids is None else _prefixes(rows, capacities, tell),
    }


def rows_of(workload: Workload) -> TraceRows:
    """A workload as rows."""
    rows = TraceRows(workload.name, OWN_FORMAT, hash_ids=workload.hash_ids, hash_block=workload.hash_block)
    rows.tenant = workload.tenant
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "session", "turn", "gap_ns"):
        column = getattr(workload, name)
        setattr(rows, name, None if column is None else array("q", column.astype(np.int64).tobytes()))
    rows.has_arrivals = bool(workload.span_s > 0)
    return rows


def _arrivals(times: Int64) -> dict[str, float]:
    """Those of `arrival_stats`; the gaps' median and largest; how many come at one instant; the fewest and the most in
    a whole minute from the first arrival on."""
    found = dict(arrival_stats(times))
    gaps = np.diff(times) / NS_PER_S
    _, together = np.unique(times, return_counts=True)
    minutes = (times - times[0]) // (60 * NS_PER_S)
    whole = max(1, int((times[-1] - times[0]) // (60 * NS_PER_S)))
    by_minute = np.bincount(minutes[minutes < whole], minlength=whole)
    return found | {
        "median_gap_s": float(np.median(gaps)) if len(gaps) else 0.0,
        "largest_gap_s": float(np.max(gaps, initial=0.0)),
        "instants": len(together),
        "mean_together": float(np.mean(together)),
        "most_together": int(np.max(together)),
        "fewest_a_minute": int(by_minute.min()),
        "most_a_minute": int(by_minute.max()),
    }


def _tenants(tenants: Sequence[str]) -> dict[str, Any]:
    names, counts = np.unique(np.array(tenants), return_counts=True)
    largest = np.argsort(-counts, kind="stable")
    shares = np.cumsum(counts[largest]) / len(tenants)
    return {
        "count": len(names),
        "largest": str(names[largest[0]]),
        "top_shares": {top: float(shares[min(top, len(shares)) - 1]) for top in (1, 4, 10)},
    }


def _sessions(rows: TraceRows, inputs: Int64) -> dict[str, Any]:
    """Requests of a session and the first one's input, sub-agents' calls left out; the times from a request's arrival
    to that of the session's next one; think times, where the trace has them."""
    nested = np.array(rows.nested or [False] * len(inputs), bool)
    sessions, times = np.array(rows.session, np.int64), np.array(rows.arrival_ns, np.int64)
    own = np.flatnonzero(~nested)
    order = own[np.lexsort([times[own], sessions[own]])]
    first = np.flatnonzero(np.diff(sessions[order], prepend=sessions[order[:1]] - 1))
    gaps = np.delete(np.diff(times[order], prepend=0), first) / NS_PER_S
    known = np.array(rows.gap_known or [], bool)
    return {
        "count": len(first),
        "nested_calls": int(nested.sum()),
        "turns": length_stats(np.diff(first, append=len(order))),
        "first_input": length_stats(inputs[order[first]]),
        "gap_s": length_stats(gaps) if rows.has_arrivals and len(gaps) else None,
        "think_s": length_stats(np.array(rows.gap_ns, np.int64)[known] / NS_PER_S) if known.any() else None,
    }


def _prefixes(rows: TraceRows, capacities: Sequence[int], tell: Tell | None) -> dict[str, Any]:
    sharing = PrefixSharing(rows.hash_block, capacities)
    times = np.array(rows.arrival_ns, np.int64)
    order = np.argsort(times, kind="stable") if rows.one_clock else np.arange(len(times))
    ids = rows.hash_ids or []
    for done, row in enumerate(order.tolist(), 1):
        sharing.add(rows.prompt_tokens[row], ids[row], None if rows.session is None else rows.session[row])
        if tell is not None and done % 500 == 0:
            tell(done)
    return sharing.figures()


def _rank_correlation(inputs: Int64, outputs: Int64) -> float | None:
    """Spearman's; None where either is constant."""
    if len(inputs) < 2 or np.ptp(inputs) == 0 or np.ptp(outputs) == 0:
        return None
    from scipy.stats import spearmanr  # slow to import, and every command begins with importing this module

    return float(spearmanr(inputs, outputs).statistic)
