"""The simulator at scale: `python -m benchmarks.scale [--quick] [--json PATH]`.

Requests with the lengths of conversations, as Poisson arrivals, on replicas of an 8B model on an H100 (roofline) behind
a router that looks at two of them; every record is written, in a folder that is thrown away. Each row is a process of
its own, one core, one after another: seconds are of its processor, from the workload's making to the joined files, and
its memory is the most that it ever had. How busy the machine is shows in what bare SimPy does in the same process,
before and after; times are given for the reference machine too, on which that is 1.48 million timeouts a second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.saving import save
from benchmarks.vidur import REFERENCE_TIMEOUTS_PER_S, timeouts_per_s
from experiments.simulated import run_simulated
from experiments.spec import check_spec

RATE = 12.0
"""Requests a second on each replica: about two thirds of what it can do, and some seven steps a request."""
FULL = ((64, 10_000), (64, 100_000), (64, 1_000_000), (1_000, 100_000))
QUICK = ((64, 2_000), (64, 10_000), (250, 10_000))


@dataclass(frozen=True, slots=True)
class Row:
    """One simulation."""

    replicas: int
    requests: int
    steps: int
    simulated_s: float
    seconds: float
    us_per_request: float
    reference_seconds: float
    """Seconds, as they would be where bare SimPy does 1.48 million timeouts a second."""
    timeouts_per_s: int
    peak_mib: float
    records_mib: float


def measure(replicas: int, requests: int, router: str) -> Row:
    """Simulate once, in this process."""
    spec = check_spec({
        "target": "sim",
        "workload": {"name": "chat", "n": requests, "rate": RATE * replicas},
        "policies": {"router": router},
        "cost": {"kind": "roofline", "model": "llama-3.1-8b", "device": "h100-sxm"},
        "limits": {"prefix_caching": False},
        "replicas": replicas,
    })  # fmt: skip
    before = timeouts_per_s()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        began = time.process_time()
        simulated_ns = run_simulated(spec, out)
        seconds = time.process_time() - began
        steps = pq.read_metadata(out / "steps.parquet").num_rows
        size = sum(path.stat().st_size for path in out.iterdir())
    bare = (before + timeouts_per_s()) / 2
    return Row(
        replicas,
        requests,
        steps,
        simulated_ns / 1e9,
        seconds,
        seconds / requests * 1e6,
        seconds * bare / REFERENCE_TIMEOUTS_PER_S,
        round(bare),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        size / 2**20,
    )


def in_a_process(replicas: int, requests: int, router: str) -> Row:
    """`measure`, where nothing was before."""
    command = [sys.executable, "-m", "benchmarks.scale", "--router", router, "--one", str(replicas), str(requests)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **_ONE_CORE})
    return Row(**json.loads(ended.stdout))


_ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS"), "1")


def show(rows: Sequence[Row], console: Console) -> None:
    """A row a simulation, times also as they would be on the reference machine."""
    table = Table(title="Simulations on one core, records written")
    for heading in (
        "replicas",
        "requests",
        "steps",
        "seconds",
        "reference s",
        "us/request",
        "to first",
        "steps/s",
        "MiB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.replicas:,}",
            f"{row.requests:,}",
            f"{row.steps:,}",
            f"{row.seconds:,.1f}",
            f"{row.reference_seconds:,.1f}",
            f"{row.us_per_request:,.0f}",
            f"{row.reference_seconds / row.requests / (rows[0].reference_seconds / rows[0].requests):.2f}",
            f"{row.steps / row.seconds:,.0f}",
            f"{row.peak_mib:,.0f}",
        )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small ones, in a minute")
    parser.add_argument("--router", default="power_of_two", help="as for `diptych simulate`")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scale.json"), help="for the figures")
    parser.add_argument("--one", nargs=2, type=int, metavar=("REPLICAS", "REQUESTS"), help="print one row as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(measure(*arguments.one, arguments.router))))
        return
    console, rows = Console(width=110), []
    for replicas, requests in QUICK if arguments.quick else FULL:
        console.print(f"{requests:,} requests on {replicas:,} replicas ...")
        rows.append(in_a_process(replicas, requests, arguments.router))
    show(rows, console)
    save(arguments.json, "scale", {"router": arguments.router, "rate_per_replica": RATE}, rows)


if __name__ == "__main__":
    main()
