"""An hour at 120% of capacity, and then an hour at 60%: `python -m benchmarks.overload [--quick] [--json PATH]`.

Requests with the lengths of conversations as Poisson arrivals, on an 8B model on an L4 (roofline). Capacity is what
one replica serves of them when all are there at once. Each row is a simulation: clients that wait, that give up and try
again, whose late requests are shed, and of whom an autoscaler's further replicas take care. Each must leave every
request accounted for, and its queue empty.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.saving import save
from experiments.economy import replica_seconds
from experiments.records import Run, read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, check_spec
from experiments.workloads import Workload, make_workload

OVER, AFTER = 1.2, 0.6
"""Of capacity."""
VARIANTS: dict[str, dict[str, Any]] = {
    "patient clients": {},
    "give up after 5 min, try again twice": {"workload": {"timeout_s": 300.0, "retries": 2}},
    "the same, and late ones shed": {
        "workload": {"timeout_s": 300.0, "retries": 2, "slo": [{"ttft_ms": 60_000.0, "droppable": True}]},
        "policies": {"queue": "edf,shed=drop"},
    },
    "up to 3 replicas by load": {
        "policies": {"autoscaler": "target_load,target=24,most=3", "router": "least_requests"},
        "cold_start_s": 60.0,
    },
}


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the requests, tries counted one by one."""

    requests: int
    completed: int
    refused: int
    timed_out: int
    dropped: int
    unfinished: int


@dataclass(frozen=True, slots=True)
class Row:
    """One simulation. Seconds of simulated time, but for `cpu_s`."""

    clients: str
    account: Account
    most_waiting: int
    empty_after_s: float
    """From the end of the overload until nobody waits."""
    p99_ttft_s: float
    replica_hours: float
    cpu_s: float


def two_rates(high: float, low: float, seconds: float, seed: int) -> NDArray[np.int64]:
    """Poisson arrivals in ns: `high` a second for so long, then `low` for as long."""
    random = np.random.default_rng(seed)
    total = (high + low) * seconds
    at = np.cumsum(random.exponential(1, int(total + 10 * total**0.5 + 10)))
    at = at[at < total]
    time_s = np.where(at < high * seconds, at / high, seconds + (at - high * seconds) / low)
    return np.rint(1e9 * time_s).astype(np.int64)


def account(run: Run) -> Account:
    """Each request's fate. Raises ValueError where one has none, or two."""
    table = run.columns("requests", ["request_id", "status"])
    if len(pc.unique(table["request_id"])) != len(table):
        raise ValueError(f"{run.folder}: a request has ended twice")
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["status"]).to_pylist()}
    known = ("stop", "length", "refused", "cancelled", "dropped", "unfinished")
    if set(counts) - set(known):
        raise ValueError(f"{run.folder}: a request has an end of its own: {', '.join(set(counts) - set(known))}")
    stop, length, *others = (counts.get(name, 0) for name in known)
    return Account(len(table), stop + length, *others)


def capacity(spec: RunSpec, count: int, folder: Path) -> float:
    """Requests a second of one replica that has enough of them: in the middle half of the ends, if all come at once."""
    workload = make_workload(spec.workload.model_copy(update={"n": count}))
    at_once = replace(workload, arrival_ns=np.zeros(count, np.int64))
    run_simulated(spec, folder, workload=at_once)
    ends = np.sort(read_run(folder).columns("requests", ["finish_ns"])["finish_ns"].to_numpy())
    first, last = count // 4, 3 * count // 4
    return float((last - first) / (ends[last] - ends[first]) * 1e9)


def measure(name: str, more: dict[str, Any], rate: float, seconds: float, folder: Path) -> Row:
    """Simulate one variant, and settle its account."""
    arrivals = two_rates(OVER * rate, AFTER * rate, seconds, seed=1)
    spec = _spec(len(arrivals), more)
    workload: Workload = replace(make_workload(spec.workload), arrival_ns=arrivals)
    began = time.process_time()
    run_simulated(spec, folder, workload=workload, overwrite=True)
    took = time.process_time() - began
    run = read_run(folder)
    found = account(run)
    ids = pc.unique(run.columns("requests", ["request_id"])["request_id"]).to_numpy()
    if set(range(len(workload))) - set(ids[ids < len(workload)].tolist()) or found.unfinished:
        raise ValueError(f"{name}: not every request has ended")
    steps = run.columns("steps", ["plan_ns", "num_waiting"])
    at, waiting = steps["plan_ns"].to_numpy(), steps["num_waiting"].to_numpy()
    after = (at >= seconds * 1e9) & (waiting == 0)
    requests = run.columns("requests", ["arrival_ns", "first_token_ns"])
    ttft = pc.drop_null(pc.subtract(requests["first_token_ns"], requests["arrival_ns"])).to_numpy()
    return Row(
        name,
        found,
        int(waiting.max()),
        float(at[after].min() / 1e9 - seconds),
        float(np.percentile(ttft, 99) / 1e9),
        sum(replica_seconds(run).values()) / 3600,
        took,
    )


def _spec(count: int, more: dict[str, Any]) -> RunSpec:
    return check_spec({
        "target": "sim",
        "cost": {"kind": "roofline", "model": "llama-3.1-8b", "device": "l4"},
        "limits": {"prefix_caching": False},
        "decisions": False,
        **more,
        "workload": {"name": "chat", "n": count, "max_model_len": 32_768, **more.get("workload", {})},
    })  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes in place of an hour")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/overload.json"), help="for the figures")
    arguments = parser.parse_args()
    seconds = 120.0 if arguments.quick else 3600.0
    console = Console(width=150)
    table = Table(title=f"{seconds:,.0f} s at {OVER:.0%} of capacity, then as long at {AFTER:.0%}")
    for heading in ("clients", "tries", "completed", "refused", "timed out", "shed", "most waiting", "empty after, s",
                    "p99 TTFT, s", "replica hours", "CPU s"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "clients" else "right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rate = capacity(_spec(1, {}), 1_000 if arguments.quick else 4_000, Path(folder) / "capacity")
        console.print(f"capacity: {rate:.2f} requests a second")
        for name, more in VARIANTS.items():
            row = measure(name, more, rate, seconds, Path(folder) / "run")
            rows.append(row)
            counts = (row.account.requests, row.account.completed, row.account.refused, row.account.timed_out)
            table.add_row(
                name,
                *(f"{count:,}" for count in (*counts, row.account.dropped, row.most_waiting)),
                f"{row.empty_after_s:,.0f}",
                f"{row.p99_ttft_s:,.1f}",
                f"{row.replica_hours:,.2f}",
                f"{row.cpu_s:,.0f}",
            )
            console.print(f"{name}: {asdict(row.account)}")
    console.print(table)
    save(arguments.json, "overload", {"seconds": seconds, "over": OVER, "after": AFTER, "capacity_per_s": rate}, rows)


if __name__ == "__main__":
    main()
