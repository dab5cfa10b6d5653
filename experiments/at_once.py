"""What the simulator can bear, about: what it finishes where all requests are there from the start on."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.metrics import summarize
from experiments.records import read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec
from experiments.workloads import Workload


def throughput_at_once(spec: RunSpec, workload: Workload, **known: Any) -> float:
    """Requests a second, up to the last one's end: below the capacity by as much as the batch is emptier then.

    `workload` may not be a closed loop; `known` is as of `run_simulated`.
    """
    at_once = workload.poisson_arrivals(rate=1e6, seed=0)
    with TemporaryDirectory() as scratch:
        run_simulated(spec, Path(scratch) / "run", workload=at_once, **known)
        throughput = summarize(read_run(Path(scratch) / "run"))["request_throughput"]
    return float(throughput)
