"""How long programs take (the turns of a session, the calls of an agent), and requests whose clients try again."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.records import Run
from experiments.token_times import COMPLETED


def program_times(run: Run) -> pd.DataFrame | None:
    """One row a program, by number: `program`, `calls`, `completed` (all of its calls), `time_ms` from its first call's
    coming to its last one's end, think and tool times included, nan where a call has not completed. None where no
    program has two calls."""
    calls = last_tries(run)
    calls = calls[calls["program"].notna()]
    if not calls["program"].duplicated().any():
        return None
    calls = calls.assign(completed=calls["status"].isin(COMPLETED))
    grouped = calls.groupby("program", sort=True)
    frame = grouped.agg(
        calls=("request_id", "size"),
        completed=("completed", "all"),
        first=("arrival_ns", "min"),
        last=("finish_ns", "max"),
    ).reset_index()
    span = (frame["last"].to_numpy(np.float64, na_value=np.nan) - frame["first"].to_numpy(np.float64)) / 1e6
    frame["time_ms"] = np.where(frame["completed"], span, np.nan)
    return frame.drop(columns=["first", "last"])


def last_tries(run: Run) -> pd.DataFrame:
    """The requests of a run, of each workload's request the last try alone, with the arrival of its first one."""
    if "clients" not in run.info:
        return run.requests
    ordered = run.requests.sort_values("request_id", kind="stable")
    number = ordered["request_id"] % run.info["clients"]["requests"]
    first = ordered.groupby(number)["arrival_ns"].transform("min")
    return ordered.assign(arrival_ns=first)[~number.duplicated(keep="last")]


def client_figures(run: Run) -> tuple[int, int, NDArray[np.float64]] | None:
    """Where clients have time-outs: the tries beyond first ones, the requests that were answered in the end, and how
    long those took from the first try on, in milliseconds. None where they wait for ever."""
    if "clients" not in run.info:
        return None
    last = last_tries(run)
    done = last[last["status"].isin(COMPLETED)]
    took = (done["finish_ns"].to_numpy(np.int64) - done["arrival_ns"].to_numpy(np.int64)) / 1e6
    return len(run.requests) - len(last), len(done), took


def program_samples_ms(run: Run) -> NDArray[np.float64] | None:
    """The times of completed programs in milliseconds, or None where no program has two calls."""
    frame = program_times(run)
    return None if frame is None else frame["time_ms"].dropna().to_numpy()
