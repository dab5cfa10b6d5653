"""Statistics of a service's clients, as ServeGen publishes them: an archive of two files a client, in windows of time.

`chunk-N-trace.csv`: window start (s), requests a second, CV, process, shape, scale; no header. `chunk-N-dataset.json`:
window start -> field -> text of a dictionary `{value: probability}`.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tarfile
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.workloads.errors import TraceError

NAME = "servegen_clients"
_MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")
_SHOWN = (50, 90, 99)


def describe_clients(path: str | Path) -> dict[str, Any]:
    """The day as a whole.

    `rate`: mean, least and most of the windows' requests a second; `cv`: of the clients, each weighted with its
    requests; `top_shares`: of the requests; `fields`: of each field mean, percentiles and maximum, over the requests of
    clients that have it.

    Raises:
        TraceError: no such archive, or a file in it that is not as described.
    """
    rates: dict[int, dict[int, float]] = {}
    squares = 0.0
    lengths: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    datasets: dict[int, dict[str, Any]] = {}
    for client, kind, text in _members(path):
        if kind == "dataset.json":
            datasets[client] = json.loads(text)
            continue
        rates[client] = {}
        for row in csv.reader(io.StringIO(text)):
            try:
                start, rate, cv = int(float(row[0])), float(row[1]), float(row[2])
            except (ValueError, IndexError):
                raise TraceError(path, None, f"chunk-{client}-trace.csv: {row!r:.60} is no window's line") from None
            rates[client][start] = rate
            squares += rate * cv
    for client, windows in datasets.items():
        for start, weight in _requests_by(sorted(int(float(key)) for key in windows), rates.get(client, {})).items():
            for field, histogram in windows[str(start)].items() if weight else ():
                for value, share in ast.literal_eval(histogram).items():
                    lengths[field][float(value)] += weight * share
    return _figures(rates, squares, {field: dict(of) for field, of in lengths.items()})


def _members(path: str | Path) -> list[tuple[int, str, str]]:
    try:
        with tarfile.open(path) as archive:
            found = []
            for member in archive.getmembers():
                named = _MEMBER.search(member.name)
                file = archive.extractfile(member) if named else None
                if named and file is not None:
                    found.append((int(named[1]), named[2], file.read().decode()))
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise TraceError(path, None, f"unreadable ({error}); expected an archive of clients' statistics") from error
    if not found:
        raise TraceError(path, None, "has no chunk-N-trace.csv; expected an archive of clients' statistics")
    return found


def _requests_by(starts: list[int], rates: dict[int, float]) -> dict[int, float]:
    """Of windows of lengths the rates of the windows of arrivals that they go for: up to the next one's start."""
    weights: dict[int, float] = defaultdict(float)
    for start, rate in rates.items():
        weights[starts[max(0, bisect_right(starts, start) - 1)]] += rate
    return weights


def _figures(
    rates: dict[int, dict[int, float]], squares: float, lengths: dict[str, dict[float, float]]
) -> dict[str, Any]:
    by_window: dict[int, float] = defaultdict(float)
    for windows in rates.values():
        for start, rate in windows.items():
            by_window[start] += rate
    totals = sorted((sum(windows.values()) for windows in rates.values()), reverse=True)
    all_requests = sum(totals)
    whole = np.array(list(by_window.values()))
    return {
        "format": NAME,
        "clients": len(rates),
        "rate": {"mean": float(whole.mean()), "min": float(whole.min()), "max": float(whole.max())},
        "cv": squares / all_requests if all_requests else None,
        "top_shares": {top: sum(totals[:top]) / all_requests if all_requests else 0.0 for top in (1, 10)},
        "fields": {field: _of_histogram(histogram) for field, histogram in lengths.items() if len(histogram) > 1},
    }


def _of_histogram(histogram: dict[float, float]) -> dict[str, float]:
    values = np.array(sorted(histogram))
    weights: NDArray[np.float64] = np.array([histogram[value] for value in values.tolist()])
    shares = np.cumsum(weights) / weights.sum()
    found = {"mean": float(values @ weights / weights.sum())}
    for percentile in _SHOWN:
        found[f"p{percentile}"] = float(values[min(int(np.searchsorted(shares, percentile / 100)), len(values) - 1)])
    return found | {"max": float(values[-1])}
