"""Load beyond capacity, and then less: nobody is lost, and the queue drains when theory says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.overload import Account, account
from experiments.records import Run, read_run
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from experiments.timeline import check_books, timeline
from experiments.workloads import Workload
from policies.request import Slo

SLOTS, STEP_MS, TOKENS = 8, 10, 20
CAPACITY = SLOTS / (TOKENS * STEP_MS / 1000)  # requests a second: 40
LONG_S = 12.0
"""Of the overload, and of the time after it."""


ARRIVALS_S = np.concatenate(
    [np.arange(0, LONG_S, 1 / (1.2 * CAPACITY)), LONG_S + np.arange(0, LONG_S, 1 / (0.6 * CAPACITY))]
)


def overloaded(folder: Path, *, slo: Slo | None = None, workload: dict[str, Any] | None = None, **more: Any) -> Run:
    """120% of capacity for a while, then 60% for as long."""
    spec = check_spec({
        "target": "sim",
        "workload": {"name": "fixed", "n": 1, **(workload or {})},
        "limits": {"num_blocks": 1000, "max_num_seqs": SLOTS, "max_model_len": 100, "prefix_caching": False, "lag": 0},
        "cost": {"kind": "constant", "step_ms": STEP_MS},
        **more,
    })  # fmt: skip
    arrivals = np.rint(1e9 * ARRIVALS_S)
    prompts = np.full(len(arrivals), 10)
    prompts[::97] = 200  # longer than the limit: refused
    outputs = np.full(len(arrivals), TOKENS)
    slos = None if slo is None else [slo] * len(arrivals)
    run_simulated(spec, folder, workload=Workload.build(arrivals, prompts, outputs, slo=slos))
    run = read_run(folder)
    check_books(run)
    return run


def test_a_queue_grows_by_what_is_too_much_and_drains_by_what_is_left_over(tmp_path: Path) -> None:
    run = overloaded(tmp_path / "run")
    sent = len(ARRIVALS_S)
    refused = -(-sent // 97)
    assert account(run) == Account(sent, sent - refused, refused, 0, 0, 0)
    frame = timeline(run)
    waiting, at_s = frame["waiting"].to_numpy(), frame["t_ns"].to_numpy() / 1e9
    served = 1 - 1 / 97
    most = (1.2 * served - 1) * CAPACITY * LONG_S
    assert waiting.max() == pytest.approx(most, rel=0.1)
    assert at_s[waiting.argmax()] == pytest.approx(LONG_S, rel=0.05)
    drained = at_s[(waiting == 0) & (at_s > LONG_S)][0]
    assert drained == pytest.approx(LONG_S + most / ((1 - 0.6 * served) * CAPACITY), rel=0.1)


def test_clients_that_give_up_and_try_again_are_all_accounted_for(tmp_path: Path) -> None:
    run = overloaded(tmp_path / "run", workload={"timeout_s": 2.0, "retries": 1})
    found = account(run)
    first = len(ARRIVALS_S)
    retries = int((run.requests["request_id"] >= first).sum())
    assert retries > 20
    assert found.requests == first + retries == found.completed + found.refused + found.timed_out
    assert found.timed_out >= retries
    assert (found.dropped, found.unfinished) == (0, 0)
    late = run.requests[run.requests["arrival_ns"] > 1.8 * LONG_S * 1e9]
    assert set(late["status"]) <= {"stop", "length", "refused"}  # all is well again


def test_who_is_shed_is_accounted_for(tmp_path: Path) -> None:
    slo = Slo(ttft_ns=500_000_000, droppable=True)
    run = overloaded(tmp_path / "run", slo=slo, policies={"queue": "edf,shed=drop"})
    found = account(run)
    assert found.dropped > 20
    assert found.requests == found.completed + found.refused + found.dropped


def test_an_autoscaler_serves_what_one_replica_cannot_and_gives_back_what_it_took(tmp_path: Path) -> None:
    scaler = "target_load,target=12,most=3,every_s=1,window_s=4"
    run = overloaded(tmp_path / "run", policies={"autoscaler": scaler, "router": "least_requests"}, cold_start_s=2.0)
    found = account(run)
    assert found.requests == found.completed + found.refused
    assert timeline(run)["waiting"].max() < 60  # 90 without
    events = run.table("replicas").to_pylist()
    assert [e["event"] for e in events].count("serve") > 1
    assert [e["event"] for e in events].count("stop") >= 1
