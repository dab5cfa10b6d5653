"""How long programs take: the turns of a session, the calls of an agent."""

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
    calls = run.requests[run.requests["program"].notna()]
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


def program_samples_ms(run: Run) -> NDArray[np.float64] | None:
    """The times of completed programs in milliseconds, or None where no program has two calls."""
    frame = program_times(run)
    return None if frame is None else frame["time_ms"].dropna().to_numpy()
