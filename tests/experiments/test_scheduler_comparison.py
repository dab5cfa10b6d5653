"""The comparison of schedulers: capacity, whether a load is one, and going on where it was stopped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import schedulers
from benchmarks.schedulers import saturated, waiting_at_last_arrival
from experiments.records import Run
from tests.experiments.rows import write_run
from tests.experiments.test_sweeps import PLUG_IN, Here


def run_of(folder: Path, waiting: list[int], ends: list[int], arrivals: list[int]) -> Run:
    """Plans every second, after each of which so many wait; requests end and arrive at these seconds."""
    steps = [
        {"step": i, "plan_ns": i * 10**9, "end_ns": (i + 1) * 10**9, "num_waiting": n} for i, n in enumerate(waiting)
    ]
    requests = [
        {"request_id": i, "arrival_ns": begin * 10**9, "finish_ns": end * 10**9, "status": "length"}
        for i, (begin, end) in enumerate(zip(arrivals, ends, strict=True))
    ]
    return write_run(folder, requests, steps)


def test_capacity_is_what_ends_a_second_until_nobody_waits(tmp_path: Path) -> None:
    """Six end in the four seconds in which others wait; the replica takes six more to finish the last two."""
    run = run_of(tmp_path / "run", [6, 5, 3, 2, 0, 0, 0, 0, 0, 0], [1, 1, 2, 3, 4, 4, 9, 10], [0] * 8)
    assert saturated(run) == 6 / 4


def test_too_few_requests_have_no_capacity(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [0, 0], [1, 2], [0, 0])
    with pytest.raises(ValueError, match="too few to measure a capacity"):
        saturated(run)


@pytest.mark.parametrize(("last", "waiting"), [(0, 3), (2, 5), (3, 1)])
def test_the_queue_is_counted_when_the_last_request_comes(tmp_path: Path, last: int, waiting: int) -> None:
    run = run_of(tmp_path / "run", [3, 4, 5, 1, 0], [4, 5], [0, last])
    assert waiting_at_last_arrival(run) == waiting


def test_rows_are_the_runs_of_every_stack_at_every_load_and_one_that_cannot_take_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = "".join(f"{i / 10},200,10\n" for i in range(20))
    (tmp_path / "trace.csv").write_text("Timestamp,Request tokens,Response tokens\n" + times)
    trace = schedulers.Trace("a trace", "trace.csv", 20, {"a": 2.0, "b": 1.0})
    stacks = [schedulers.REFERENCE, {"scheduler": "mixed", "queue": "plug_in:Mine,break_off=1"}]
    here = Here()
    for name, value in {
        "TRACES": (trace,),
        "LOADS": (0.5, 1.0),
        "stacks": lambda: stacks,
        "RUNS": tmp_path / "runs",
        "LocalRunner": lambda processes: nullcontext(here),
    }.items():
        monkeypatch.setattr(schedulers, name, value)
    (tmp_path / "plug_in.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    rows, capacities = schedulers.measure(tmp_path, True, Console(quiet=True))
    assert [(row.load, row.queue, row.error) for row in rows] == [
        (load, stack["queue"], error)
        for load in (0.5, 1.0)
        for stack, error in zip(stacks, ("", "RuntimeError: not today"), strict=True)
    ]
    assert capacities["a trace"] > 0
    assert rows[0].figures["completed"] == 2  # a tenth of the trace
    assert rows[1].figures == {}
    assert any("not today" in line for line in schedulers.markdown(rows, capacities))
    ran = len(here.ran)
    assert schedulers.measure(tmp_path, True, Console(quiet=True)) == (rows, capacities)
    assert len(here.ran) == ran + 2  # those that failed are tried again
