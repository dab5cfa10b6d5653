"""Queues and memory over time, summed over the replicas, and Little's law as a check of the books."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.records import Run, RunError
from experiments.token_times import MOVE
from policies.records import ALIVE

Int64 = NDArray[np.int64]


def timeline(run: Run) -> pd.DataFrame:
    """State after each plan, summed over the replicas; it holds until the next row.

    Columns: `t_ns` (int64, ascending), `running`, `waiting` (requests), `kv_blocks` (blocks that requests hold; idle
    cached ones are not counted), `host_blocks` (in host memory: of requests that are swapped out, and cached
    prefixes), `disk_blocks`. The last row ends the run: it repeats the state before it at the last step's end.
    Raises RunError for a client's run, which has no steps.
    """
    steps = run.steps
    columns = ["running", "waiting", "kv_blocks", "host_blocks", "disk_blocks"]
    changes = []
    for _, rows in steps.groupby("replica", sort=True):
        replica = int(rows["replica"].iloc[0])
        state = np.stack(
            [
                rows["num_running"].to_numpy(np.int64),
                rows["num_waiting"].to_numpy(np.int64),
                _num_blocks(run, replica)
                - rows["free_blocks"].to_numpy(np.int64)
                - rows["idle_blocks"].to_numpy(np.int64),
                _num_host_blocks(run, replica) - rows["free_host_blocks"].to_numpy(np.int64),
                rows["disk_blocks"].to_numpy(np.int64),
            ]
        )
        changes.append((rows["plan_ns"].to_numpy(), np.diff(state, axis=1, prepend=0)))
    if not changes:
        return pd.DataFrame({"t_ns": np.zeros(0, np.int64), **{c: np.zeros(0, np.int64) for c in columns}})
    times = np.concatenate([t for t, _ in changes])
    order = np.argsort(times, kind="stable")
    levels = np.cumsum(np.concatenate([d for _, d in changes], axis=1)[:, order], axis=1)
    times = times[order]
    # Plans at one instant: what the last of them leaves.
    last = np.append(times[1:] != times[:-1], True)
    end = max(int(steps["end_ns"].max()), int(times[-1]))
    frame = {c: np.append(levels[i][last], levels[i][-1]) for i, c in enumerate(columns)}
    return pd.DataFrame({"t_ns": np.append(times[last], end), **frame})


def states(run: Run) -> pd.DataFrame:
    """A run's timeline, and what share of the blocks is in use: `kv_share`, and of a run with a tier in host memory
    `host_share`, with one on disk `disk_share`, each in percent of all replicas'."""
    frame, replicas = timeline(run), [int(replica) for replica in run.steps["replica"].unique()]
    shares = {"kv_share": 100.0 * frame["kv_blocks"] / max(1, sum(_num_blocks(run, replica) for replica in replicas))}
    if host_blocks := sum(_num_host_blocks(run, replica) for replica in replicas):
        shares["host_share"] = 100.0 * frame["host_blocks"] / host_blocks
    if disk_blocks := sum(int(run.limits_of(replica).get("num_disk_blocks", 0)) for replica in replicas):
        shares["disk_share"] = 100.0 * frame["disk_blocks"] / disk_blocks
    return frame.assign(**shares)


def window(frame: pd.DataFrame, begin_ns: int, end_ns: int) -> pd.DataFrame:
    """A part of a timeline: what holds at `begin_ns`, every change up to `end_ns`, and a last row there.

    A timeline that ends before `end_ns` ends where it ends; one that does not reach into the part has no rows.
    """
    t_ns = frame["t_ns"].to_numpy()
    if not len(t_ns) or begin_ns >= t_ns[-1] or end_ns <= t_ns[0]:
        return frame.iloc[:0]
    begin, end = max(begin_ns, int(t_ns[0])), min(end_ns, int(t_ns[-1]))
    first = int(np.searchsorted(t_ns, begin, side="right")) - 1
    last = int(np.searchsorted(t_ns, end, side="left"))
    part = frame.iloc[first:last]
    times = np.concatenate([[begin], part["t_ns"].to_numpy()[1:], [end]])
    return pd.concat([part, part.iloc[[-1]]], ignore_index=True).assign(t_ns=times)


def time_average(frame: pd.DataFrame, column: str) -> float:
    """The mean of a timeline's column over time; nan for a timeline that lasts no time."""
    held = np.diff(frame["t_ns"].to_numpy())
    total = int(held.sum()) if len(held) else 0
    return float(np.dot(frame[column].to_numpy()[:-1], held)) / total if total else float("nan")


@dataclass(frozen=True, slots=True)
class LittlesLaw:
    """Both sides of L = lambda W (Little, Operations Research 9(3), 1961) over a run.

    Attributes:
        in_system: L, the mean number of requests in the system over time, counted from steps alone.
        throughput: lambda, requests that entered a second.
        time_in_system_s: W, mean seconds from the plan that could first see a request to its end, from its own record.
    """

    in_system: float
    throughput: float
    time_in_system_s: float

    @property
    def from_requests(self) -> float:
        """lambda W."""
        return self.throughput * self.time_in_system_s

    @property
    def relative_difference(self) -> float:
        """(L - lambda W) / lambda W; rounding apart it is 0 in a run whose books are in order."""
        return self.in_system / self.from_requests - 1 if self.from_requests else float(self.in_system != 0)


def littles_law(run: Run) -> LittlesLaw:
    """Count the requests in the system twice, from steps.parquet and from requests.parquet.

    From steps: after each plan so many run and wait; each ends with the report of a step. From requests: each is in
    the system from the plan before which it was handed over to its end (a cancelled one to the next plan).
    Raises RunError for a run that is not complete: requests that had not ended are not in its records.
    """
    if not run.complete:
        raise RunError(f"{run.folder} is not complete: the requests that were alive when it died are not recorded")
    steps = run.steps
    if not len(steps):
        return LittlesLaw(0.0, 0.0, 0.0)
    lag = int(run.limits.get("lag", 0))
    begin = int(steps["plan_ns"].min())
    end = int(max(steps["end_ns"].max(), steps["plan_ns"].max(), run.requests["finish_ns"].fillna(0).max()))
    entered = run.requests[run.requests["status"] != "refused"]
    held_by_steps = held_by_requests = 0
    moves = np.concatenate([np.zeros(0, np.int64), *entered["moves"]]).astype(np.int64).reshape(-1, MOVE)
    for replica, rows in steps.groupby("replica", sort=True):
        rows = rows.sort_values("step")
        held_by_steps += _held_by_steps(rows, lag, end)
        held_by_requests += _held_by_requests(entered[entered["replica"] == replica], rows, end)
        held_by_requests += _held_before_moves(moves[moves[:, 0] == replica], rows, end)
    span_s, count = (end - begin) / 1e9, len(entered)
    if not span_s or not count:
        return LittlesLaw(0.0, 0.0, 0.0)
    return LittlesLaw(held_by_steps / 1e9 / span_s, count / span_s, held_by_requests / 1e9 / count)


def check_books(run: Run) -> None:
    """Raise RunError unless Little's law holds to rounding in a complete run."""
    law = littles_law(run)
    if abs(law.relative_difference) > 1e-9:
        raise RunError(
            f"{run.folder}: steps say that {law.in_system} requests are in the system on average, requests say "
            f"{law.from_requests}; the record contradicts itself"
        )


def _held_by_steps(rows: pd.DataFrame, lag: int, end: int) -> int:
    """Request-nanoseconds in the system, from one replica's steps in order."""
    step, plan_ns = rows["step"].to_numpy(), rows["plan_ns"].to_numpy()
    present = rows[list(ALIVE)].sum(axis=1).to_numpy(np.int64)
    held = int(np.dot(present, np.append(plan_ns[1:], end) - plan_ns))
    # Who ended with a report was counted on to the plan that follows it: the next one, or with lag=1 the one after.
    following = _plan_time(step, plan_ns, step + 1 + lag, end)
    gone = int(np.dot(rows["num_finished"].to_numpy(np.int64), following - rows["end_ns"].to_numpy()))
    return held - gone


def _held_by_requests(requests: pd.DataFrame, rows: pd.DataFrame, end: int) -> int:
    """Request-nanoseconds in the system, from the records of one replica's requests."""
    step, plan_ns = rows["step"].to_numpy(), rows["plan_ns"].to_numpy()
    entry = _plan_time(step, plan_ns, requests["before_step"].to_numpy(), end)
    finish = requests["finish_ns"].to_numpy(np.int64, na_value=end)
    cancelled = requests["end_before_step"].notna().to_numpy()
    cancel = _plan_time(step, plan_ns, requests["end_before_step"].to_numpy(np.int64, na_value=0), end)
    return int(np.sum(np.where(cancelled, cancel, finish) - entry))


def _held_before_moves(moves: Int64, rows: pd.DataFrame, end: int) -> int:
    """Request-nanoseconds on one replica of those that left it for another, which they did before a plan."""
    step, plan_ns = rows["step"].to_numpy(), rows["plan_ns"].to_numpy()
    return int(np.sum(_plan_time(step, plan_ns, moves[:, 2], end) - _plan_time(step, plan_ns, moves[:, 1], end)))


def _plan_time(step: Int64, plan_ns: Int64, wanted: Int64, end: int) -> Int64:
    """When the first plan with at least this index was made; `end` where there is none."""
    return np.append(plan_ns, end)[np.searchsorted(step, wanted)]


def _num_blocks(run: Run, replica: int) -> int:
    num_blocks = run.limits_of(replica).get("num_blocks")
    if not isinstance(num_blocks, int):
        raise RunError(f"{run.folder / 'run.json'} lacks limits.num_blocks, the KV blocks of a replica")
    return num_blocks


def _num_host_blocks(run: Run, replica: int) -> int:
    return int(run.limits_of(replica).get("num_host_blocks", 0))
