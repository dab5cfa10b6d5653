"""The comparison of schedulers: capacity, whether a load is one, and going on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.schedulers import _noted, saturated, waiting_at_last_arrival
from experiments.records import Run
from tests.experiments.rows import write_run


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


def test_a_note_that_was_cut_off_is_left_out_and_those_around_it_are_not(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    assert _noted(notes) == {}
    first, second = ({"key": key, "row": {"load": 0.7}} for key in "ab")
    notes.write_text(f'{json.dumps(first)}\n{{"key": "c", "row": {{"lo\n{json.dumps(second)}\n\n')
    assert _noted(notes) == {"a": {"load": 0.7}, "b": {"load": 0.7}}
