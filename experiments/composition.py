"""What a device did over time: prefill, decode, both in one step, or nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.records import Run

KINDS = {"decode": "decode only", "mixed": "decode and prefill", "prefill": "prefill only", "idle": "idle"}
"""Column of `composition` -> what a figure calls it."""

_COUNTS = {"preemptions": "num_preempted", "swapped_out": "swapped_out", "swapped_in": "swapped_in"}
"""Column of `composition` -> column of steps.parquet that is added up in each span."""

_BUSY = ("decode", "mixed", "prefill")


def composition(run: Run, begin_ns: int, end_ns: int, spans: int = 600) -> pd.DataFrame:
    """Shares of the time from `begin_ns` to `end_ns`, in so many equal spans, averaged over the replicas.

    Columns: `t_s` (begin of the span, seconds), `decode`, `mixed`, `prefill`, `idle` (0 to 1, adding up to 1) and
    `preemptions`, `swapped_out` and `swapped_in` (how many were decided on in the span, and tokens whose KV was moved
    to host memory and back, of all replicas). The last row closes the last span.
    Nothing is left out: a span that holds many steps has their time added up. Raises RunError for a client's run.
    """
    edges = np.linspace(begin_ns, max(end_ns, begin_ns + 1), spans + 1)
    shares = {kind: np.zeros(spans) for kind in _BUSY}
    counts = {name: np.zeros(spans, np.int64) for name in _COUNTS}
    replicas = 0
    for _, rows in run.steps.groupby("replica", sort=True):
        replicas += 1
        for kind, busy in _busy(rows).items():
            shares[kind] += np.diff(np.interp(edges, *busy)) / np.diff(edges)
        for name, column in _COUNTS.items():
            some = rows[rows[column] > 0]
            at = np.searchsorted(edges, some["plan_ns"].to_numpy(), side="right") - 1
            inside = (at >= 0) & (at < spans)
            np.add.at(counts[name], at[inside], some[column].to_numpy(np.int64)[inside])
    frame = pd.DataFrame({kind: share / max(replicas, 1) for kind, share in shares.items()})
    frame["idle"] = np.clip(1.0 - frame.sum(axis=1), 0.0, 1.0)
    frame = frame.assign(**counts)
    frame.insert(0, "t_s", edges[:-1] / 1e9)
    last = frame.iloc[[-1]].assign(t_s=edges[-1] / 1e9)
    return pd.concat([frame, last], ignore_index=True)


def _busy(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind of step, time and the busy nanoseconds of that kind so far: a line to read off at any time."""
    rows = rows[(rows["num_decodes"] > 0) | (rows["num_chunks"] > 0)]
    launch, end = rows["launch_ns"].to_numpy(np.float64), rows["end_ns"].to_numpy(np.float64)
    if not len(rows):
        return {kind: (np.zeros(1), np.zeros(1)) for kind in _BUSY}
    end = np.maximum.accumulate(end)
    # With lag 1 a step is launched while the one before runs: it has the device from that one's end.
    begin = np.minimum(np.maximum(launch, np.append(launch[0], end[:-1])), end)
    decodes, chunks = rows["num_decodes"].to_numpy() > 0, rows["num_chunks"].to_numpy() > 0
    masks = {"decode": decodes & ~chunks, "mixed": decodes & chunks, "prefill": ~decodes & chunks}
    times = np.stack([begin, end], axis=1).ravel()
    lines = {}
    for kind, mask in masks.items():
        after = np.cumsum(np.where(mask, end - begin, 0.0))
        lines[kind] = (times, np.stack([np.append(0.0, after[:-1]), after], axis=1).ravel())
    return lines
