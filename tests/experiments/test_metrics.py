"""Metrics from the records alone: against examples worked by hand, slow references, and what the executor saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.metrics import (
    latencies_ms,
    littles_law,
    outline,
    per_request,
    summarize,
    time_average,
    timeline,
    token_times,
)
from experiments.records import Run, RunError, RunWriter, read_run
from policies.stack import StackSpec
from tests.experiments.fake_run import LIMITS, FakeRequest, drive, fake_info, fake_run, random_requests
from tests.experiments.rows import write_run

MS = 1_000_000


def by_hand(folder: Path, **changes: Any) -> Run:
    """Two requests that ran in steps of 10 ms, one cancelled, one refused.

    step          0      1      2      3      4
    ends at (ms)  10     20     30     40     50
    clock         -      1      2      -      3
    request 0     token  token  token         (token, discarded)
    request 1                   token  token
    """
    ends = [10, 20, 30, 40, 50]
    clocks = [0, 1, 2, 0, 3]
    held = [4, 4, 8, 8, 2]
    steps = [
        {
            "step": i,
            "plan_ns": (end - 10) * MS,
            "end_ns": end * MS,
            "decode_clock": clock,
            "num_decodes": 1,
            "padded_tokens": 1,
            "num_running": 2,
            "num_waiting": 0,
            "free_blocks": 40 - blocks - 1,
            "idle_blocks": 1,
        }
        for i, (end, clock, blocks) in enumerate(zip(ends, clocks, held, strict=True))
    ]
    finished = {"prompt_tokens": 10, "cached_tokens": 0, "max_tokens": 9, "first_scheduled_ns": 0}
    requests: list[dict[str, Any]] = [
        {
            **finished,
            "request_id": 1,
            "arrival_ns": 4 * MS,
            "output_tokens": 2,
            "cached_tokens": 5,
            "preemptions": 1,
            "first_scheduled_ns": 20 * MS,
            "first_token_ns": 30 * MS,
            "finish_ns": 40 * MS,
            "status": "length",
            "token_steps": [2, 3],
        },
        {
            **finished,
            "request_id": 0,
            "arrival_ns": 0,
            "output_tokens": 3,
            "first_token_ns": 10 * MS,
            "finish_ns": 32 * MS,
            "status": "stop",
            "token_steps": [0],
            "decode_runs": [0, 3],
        },
        {"request_id": 2, "arrival_ns": 5 * MS, "finish_ns": 60 * MS, "status": "cancelled", "end_before_step": 5},
        {"request_id": 3, "arrival_ns": 6 * MS, "status": "refused", "error": "too long"},
    ]
    requests[1] |= changes
    return write_run(folder, requests, steps)


def test_latencies_of_an_example_by_hand(tmp_path: Path) -> None:
    frame = per_request(by_hand(tmp_path / "run")).set_index("request_id")
    assert frame["ttft_ms"].tolist()[:2] == [10, 26]
    assert frame["e2e_ms"].tolist()[:2] == [32, 36]
    assert frame["tpot_ms"].tolist()[:2] == [11, 10]  # (32 - 10) / 2 and (36 - 26) / 1
    assert frame["queue_ms"].tolist()[:2] == [0, 16]
    assert frame["completed"].tolist() == [True, True, False, False]
    assert frame.loc[[2, 3], ["ttft_ms", "tpot_ms", "e2e_ms"]].isna().all(axis=None)


def test_token_times_of_an_example_by_hand(tmp_path: Path) -> None:
    run = by_hand(tmp_path / "run")
    times = token_times(run)
    assert times.of(0).tolist() == [30 * MS, 40 * MS]
    assert times.of(1).tolist() == [10 * MS, 20 * MS, 30 * MS]
    assert times.counts.tolist() == [2, 3, 0, 0]
    assert sorted(latencies_ms(run)["itl"]) == [10, 10, 10]


def test_the_summary_of_an_example_by_hand(tmp_path: Path) -> None:
    summary = summarize(by_hand(tmp_path / "run"), slo={"ttft": 25, "e2el": 100})
    expected = {
        "duration": 0.06,
        "num_prompts": 4,
        "completed": 2,
        "failed": 2,
        "total_input_tokens": 20,
        "total_output_tokens": 5,
        "request_throughput": 2 / 0.06,
        "output_throughput": 5 / 0.06,
        "total_token_throughput": 25 / 0.06,
        "request_goodput": 1 / 0.06,
        "max_output_tokens_per_s": 5,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 18,
        "median_ttft_ms": 18,
        "std_ttft_ms": 8,
        "p90_ttft_ms": 10 + 0.9 * 16,
        "mean_tpot_ms": 10.5,
        "mean_itl_ms": 10,
        "mean_e2el_ms": 34,
        "mean_queue_ms": 8,
        "preemptions": 1,
        "cached_token_share": 0.25,
        "max_kv_blocks": 8,
        "mean_kv_blocks": (4 + 4 + 8 + 8 + 2) / 5,
        "steps": 5,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert summary["statuses"] == {
        "stop": 1,
        "length": 1,
        "cancelled": 1,
        "dropped": 0,
        "refused": 1,
        "failed": 0,
        "unfinished": 0,
    }


def test_goodput_asks_for_every_objective_and_knows_its_names(tmp_path: Path) -> None:
    run = by_hand(tmp_path / "run")
    met = {"ttft": 26.0, "tpot": 11.0, "e2el": 36.0}
    assert summarize(run, met)["request_goodput"] == pytest.approx(2 / 0.06)
    assert summarize(run, {**met, "tpot": 10.5})["request_goodput"] == pytest.approx(1 / 0.06)
    assert summarize(run, {**met, "tpot": 10.5, "ttft": 9})["request_goodput"] == 0
    with pytest.raises(ValueError, match="no objective 'itl'"):
        summarize(run, {"itl": 1})


def test_the_keys_are_those_of_vllm_bench_serve(tmp_path: Path) -> None:
    summary = summarize(by_hand(tmp_path / "run"), slo={}, percentiles=(25, 99.9))
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p25", "p99.9"):
            assert summary[f"{statistic}_{name}_ms"] is not None


def test_a_run_of_nothing_has_a_summary_without_figures(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path / "run", [], []))
    assert summary["num_prompts"] == summary["completed"] == summary["duration"] == 0
    assert summary["request_throughput"] == 0
    assert summary["mean_ttft_ms"] is summary["p99_itl_ms"] is summary["mean_kv_blocks"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_tokens": 5}, "request 0 ended with 5 tokens, but steps are recorded for 4"),
        ({"first_token_ns": 11 * MS}, "first token of request 0 came at 10000000 ns by the steps, at 11000000"),
        ({"token_steps": [0, 1]}, "request 0 has two tokens in one step"),
        ({"finish_ns": 29 * MS}, "request 0 has a token after its end"),
        ({"decode_runs": [0, 3, 4]}, "not pairs"),
        ({"decode_runs": [3, 0]}, "not pairs"),
    ],
)
def test_records_that_contradict_each_other_are_an_error(tmp_path: Path, changes: Any, message: str) -> None:
    run = by_hand(tmp_path / "run", **changes)
    with pytest.raises(RunError, match=message):
        token_times(run)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("seed", "stack"),
    [(1, StackSpec()), (2, StackSpec(queue="sjf")), (3, StackSpec(scheduler="prefill_first"))],
    ids=str,
)
def test_token_times_are_those_at_which_the_executor_gave_out_tokens(
    tmp_path: Path, lag: int, seed: int, stack: StackSpec
) -> None:
    requests = random_requests(60, seed, cancelled=0.2)
    limits = replace(LIMITS, lag=lag)
    with RunWriter(tmp_path / "run", fake_info(limits=limits)) as writer:
        seen = drive(writer, dict(enumerate(requests)), limits, stack=stack)
    run = read_run(tmp_path / "run")
    times = token_times(run)
    completed = run.requests["status"].isin(["stop", "length"])
    assert completed.sum() > 30
    assert run.requests["preemptions"].sum() > 0
    for position, request_id in enumerate(run.requests["request_id"]):
        if completed[position]:
            assert times.of(position).tolist() == seen[request_id]
            assert len(seen[request_id]) == requests[request_id].output_tokens


def test_each_replica_counts_its_own_steps(tmp_path: Path) -> None:
    halves = [dict(list(enumerate(random_requests(40, seed=4)))[i::2]) for i in range(2)]
    with RunWriter(tmp_path / "run", fake_info()) as writer:
        # Replica 7 before replica 2: neither the order of the rows nor the numbers mean anything.
        seen = drive(writer, halves[0], replica=7) | drive(writer, halves[1], replica=2)
    run = read_run(tmp_path / "run")
    times = token_times(run)
    for position, request_id in enumerate(run.requests["request_id"]):
        assert times.of(position).tolist() == seen[request_id]
    assert littles_law(run).relative_difference == pytest.approx(0, abs=1e-12)


def test_requests_that_were_still_running_are_counted_as_unfinished(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", fake_info()) as writer:
        drive(writer, dict(enumerate(random_requests(40, seed=6))), max_steps=60)
    summary = summarize(read_run(tmp_path / "run"))
    assert summary["statuses"]["unfinished"] > 0
    assert summary["completed"] + summary["failed"] == summary["num_prompts"]
    assert summary["failed"] == summary["statuses"]["unfinished"]


@pytest.mark.parametrize("lag", [0, 1])
def test_requests_alive_when_a_run_died_are_counted_as_unfinished(tmp_path: Path, lag: int) -> None:
    """All arrive at once, so that whoever has no record when it dies was alive."""
    requests = [replace(request, arrival_ns=0) for request in random_requests(40, seed=6)]
    limits = replace(LIMITS, lag=lag)
    writer = RunWriter(tmp_path / "run", fake_info(limits=limits), flush_seconds=None)

    class UntilStep50:
        """Takes rows until it has step 50, as a process that is killed then."""

        alive = True

        def request(self, row: tuple[object, ...]) -> None:
            if self.alive:
                writer.request(row)

        def decision(self, row: tuple[object, ...]) -> None:
            pass

        def step(self, row: tuple[object, ...]) -> None:
            if self.alive:
                writer.step(row)
            self.alive = self.alive and row[1] != 50

    drive(UntilStep50(), dict(enumerate(requests)), limits)
    writer.abort()
    summary = summarize(read_run(tmp_path / "run"))
    assert 0 < summary["completed"] < 40
    assert summary["num_prompts"] == 40


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_littles_law_holds_in_every_run(tmp_path: Path, lag: int, seed: int) -> None:
    law = littles_law(fake_run(tmp_path / "run", random_requests(60, seed, cancelled=0.2), lag=lag))
    assert law.in_system > 1
    assert law.from_requests == pytest.approx(law.in_system, rel=1e-12)


def test_littles_law_shows_books_that_are_not_in_order(tmp_path: Path) -> None:
    steps = [
        {"step": i, "plan_ns": 10 * i, "end_ns": 10 * i + 10, "num_running": 1, "num_finished": int(i == 3)}
        for i in range(4)
    ]
    request = {"finish_ns": 40, "status": "stop"}
    assert littles_law(write_run(tmp_path / "right", [request], steps)).relative_difference == 0
    steps[1]["num_running"] = 2
    assert littles_law(write_run(tmp_path / "wrong", [request], steps)).relative_difference == pytest.approx(0.25)


def test_littles_law_wants_a_run_that_was_closed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", fake_info())
    writer.abort()
    with pytest.raises(RunError, match="not complete"):
        littles_law(read_run(tmp_path / "run"))


def test_the_timeline_is_the_sum_over_replicas_at_every_time(tmp_path: Path) -> None:
    halves = [dict(list(enumerate(random_requests(40, seed=8)))[i::2]) for i in range(2)]
    with RunWriter(tmp_path / "run", fake_info()) as writer:
        for replica, half in enumerate(halves):
            drive(writer, half, replica=replica)
    run = read_run(tmp_path / "run")
    frame = timeline(run)
    assert (np.diff(frame["t_ns"]) >= 0).all()
    for at in frame.sample(50, random_state=0).itertuples():
        expected: Counter[str] = Counter()
        for _, rows in run.steps.groupby("replica"):
            past = rows[rows["plan_ns"] <= at.t_ns]
            if len(past):
                last = past.iloc[-1]
                expected["running"] += last["num_running"]
                expected["waiting"] += last["num_waiting"]
                expected["kv_blocks"] += LIMITS.num_blocks - last["free_blocks"] - last["idle_blocks"]
        assert (at.running, at.waiting, at.kv_blocks) == (
            expected["running"],
            expected["waiting"],
            expected["kv_blocks"],
        )
    assert time_average(frame, "running") == pytest.approx(
        sum(r * d for r, d in zip(frame["running"][:-1], np.diff(frame["t_ns"]), strict=True))
        / (frame["t_ns"].iloc[-1] - frame["t_ns"].iloc[0])
    )


def test_a_refused_request_is_counted_and_has_no_latency(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", [FakeRequest(0, 500, 1, 1), FakeRequest(0, 5, 3, 3)])
    summary = summarize(run)
    assert summary["statuses"]["refused"] == 1
    assert summary["completed"] == 1
    assert per_request(run)["ttft_ms"].isna().tolist() == [True, False]


def test_an_outline_agrees_with_the_whole_summary_and_reads_no_steps(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", random_requests(40, seed=9, cancelled=0.2))
    figures, whole = outline(run, (50, 99)), summarize(run, percentiles=(50, 99))
    gaps = {name for name in figures if name.endswith("_itl_ms")}
    assert len(gaps) == 5
    assert all(figures[name] is None for name in gaps)
    for name in figures.keys() - gaps:
        assert figures[name] == (pytest.approx(whole[name]) if name.endswith("_ms") else whole[name]), name
    again = read_run(tmp_path / "run")
    (tmp_path / "run" / "steps.parquet").write_bytes(b"")
    assert outline(again, (50, 99)) == figures
