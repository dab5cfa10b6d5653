"""A run as a trace in Chrome's event format, which Perfetto and chrome://tracing show.

One process a replica: its steps, one after another, the counters of its queues and memory, and the phases of its
requests as asynchronous tracks. Times are microseconds with three decimals, so that no nanosecond is lost.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

from experiments.records import Run

_COLUMNS = (
    *("step", "plan_ns", "launch_ns", "end_ns", "num_decodes", "num_chunks", "chunk_tokens", "num_preempted"),
    *("num_running", "num_waiting", "free_blocks", "idle_blocks"),
)


def trace_events(run: Run) -> Iterator[dict[str, Any]]:
    """The events, in order of kind and time. Raises RunError for a client's run, which has no steps."""
    for replica in sorted(set(run.steps["replica"].tolist())):
        rows = run.steps[run.steps["replica"] == replica]
        name = f"{run.name} ({run.kind})" + (f", replica {replica}" if replica else "")
        yield {"ph": "M", "name": "process_name", "pid": replica, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_name", "pid": replica, "tid": 0, "args": {"name": "steps"}}
        columns = list(_COLUMNS)
        num_blocks, before = int(run.limits_of(replica)["num_blocks"]), 0
        for row in zip(*(rows[column].tolist() for column in columns), strict=True):
            at = dict(zip(columns, row, strict=True))
            counters = {
                "running requests": at["num_running"],
                "waiting requests": at["num_waiting"],
                "KV blocks in use": num_blocks - at["free_blocks"] - at["idle_blocks"],
            }
            for counter, value in counters.items():
                yield {"ph": "C", "name": counter, "pid": replica, "ts": at["plan_ns"] / 1e3, "args": {"": value}}
            if at["num_preempted"]:
                yield {
                    "ph": "i",
                    "name": "preemption",
                    "pid": replica,
                    "tid": 0,
                    "s": "p",
                    "ts": at["plan_ns"] / 1e3,
                }
            if not at["num_decodes"] and not at["num_chunks"]:
                continue
            # With lag 1 a step is launched while the one before runs: it is shown from that one's end on.
            begin = min(max(at["launch_ns"], before), at["end_ns"])
            before = at["end_ns"]
            kind = "mixed" if at["num_decodes"] and at["num_chunks"] else "decode" if at["num_decodes"] else "prefill"
            yield {
                "ph": "X",
                "name": kind,
                "cat": "step",
                "pid": replica,
                "tid": 0,
                "ts": begin / 1e3,
                "dur": (at["end_ns"] - begin) / 1e3,
                "args": {name: at[name] for name in ("step", "num_decodes", "num_chunks", "chunk_tokens")},
            }
    yield from _requests(run)


def _requests(run: Run) -> Iterator[dict[str, Any]]:
    """Each request from its arrival to its end, and within that its waiting, prefill and decode."""
    columns = ["request_id", "replica", "arrival_ns", "first_scheduled_ns", "first_token_ns", "finish_ns", "status"]
    frame = run.requests.sort_values(["arrival_ns", "request_id"], kind="stable")[columns]
    last = int(run.steps["end_ns"].max()) if len(run.steps) else 0
    for request, replica, arrival, *times, status in frame.astype(object).itertuples(index=False, name=None):
        scheduled, first, finish = (
            None if value is None or value != value else int(value) for value in map(_plain, times)
        )
        end = max(last if finish is None else finish, arrival)
        marks = [arrival, scheduled, first, end]
        yield from _pair(f"request {request}", request, replica, arrival, end, {"status": status})
        for name, at in (("waiting", 0), ("prefill", 1), ("decode", 2)):
            begin = marks[at]
            until = next((mark for mark in marks[at + 1 :] if mark is not None), end)
            if begin is not None and until > begin:
                yield from _pair(name, request, replica, begin, until, {})


def _plain(value: object) -> Any:
    return None if value is None or str(value) in ("<NA>", "nan") else value


def _pair(
    name: str, request: int, replica: int, begin: int, end: int, args: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    common = {"name": name, "cat": "request", "id": int(request), "pid": replica, "tid": 1}
    yield {"ph": "b", **common, "ts": begin / 1e3, "args": args}
    yield {"ph": "e", **common, "ts": end / 1e3}


def write_trace(run: Run) -> bytes:
    """The trace as gzipped JSON, which Perfetto opens as it is."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=4, mtime=0) as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        for place, event in enumerate(trace_events(run)):
            file.write((",\n" if place else "").encode() + json.dumps(event, separators=(",", ":")).encode())
        file.write(b"\n]}\n")
    return buffer.getvalue()
