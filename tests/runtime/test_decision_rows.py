"""The rows a real run leaves: what each step did, when, and what became of each request, one step late or not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from policies.contract import Scheduler
from policies.records import DECISIONS, REQUESTS, STEPS
from runtime.engine import Engine
from runtime.sequence import Output
from tests.runtime.engines import Listener, Rows, greedy, serve, tiny
from tests.runtime.test_engine_tokens import PauseAndResume


class Ordered(Rows):
    """Notes the columns of every row besides."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[tuple[str, int]] = set()

    def request(self, row: tuple[object, ...]) -> None:
        self.widths.add(("request", len(row)))
        super().request(row)

    def step(self, row: tuple[object, ...]) -> None:
        self.widths.add(("step", len(row)))
        super().step(row)

    def decision(self, row: tuple[object, ...]) -> None:
        self.widths.add(("decision", len(row)))
        super().decision(row)


@dataclass
class Run:
    rows: Ordered
    listeners: list[Listener]
    cancelled: int

    def decisions(self, request_id: int, *kinds: str) -> list[dict[str, Any]]:
        return [d for d in self.rows.decisions if d["request_id"] == request_id and d["kind"] in kinds]

    def token_steps(self, row: dict[str, Any]) -> list[int]:
        """The step of each token that was computed for a request, in order."""
        by_clock = {step["decode_clock"]: step["step"] for step in self.rows.steps if step["decode_clock"]}
        runs = row["decode_runs"]
        clocks = [c for start, end in zip(runs[::2], runs[1::2], strict=True) for c in range(start + 1, end + 1)]
        return sorted([*row["token_steps"], *(by_clock[clock] for clock in clocks)])


SCHEDULERS = ["mixed", "sarathi,chunk_size=24", "prefill_first", "static,max_batch_size=3", "pause"]


@pytest.fixture(scope="module", params=[(name, lag) for name in SCHEDULERS for lag in (0, 1)], ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    """Twelve requests, some of which come while others run, in little memory; one is cancelled, one refused."""
    name, lag = request.param
    rng = random.Random(2)
    rows = Ordered()
    listeners = [Listener() for _ in range(12)]
    scheduler: str | Scheduler = PauseAndResume(9, True) if name == "pause" else name
    num_blocks = 200 if name == "pause" else 24
    limits: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "max_model_len": 160}
    with serve(tiny(), scheduler, recorder=rows, lag=lag, num_blocks=num_blocks, block_size=8, **limits) as engine:
        for i, listener in enumerate(listeners):
            prompt = [] if i == 4 else [rng.randrange(512) for _ in range(rng.randint(1, 60))]
            stop = tuple(range(0, 512, 25)) if i % 3 == 0 else ()
            listen = _cancel_at_third_token(engine, listener) if i == 7 else listener
            engine.submit(prompt, greedy(90 if i == 7 else rng.randint(1, 40), stop_token_ids=stop), listen)
            if i % 4 == 3:
                listeners[i - 1].wait_for_tokens(2)
        for listener in listeners:
            listener.last()
    return Run(rows, listeners, 7)


def _cancel_at_third_token(engine: Engine, listener: Listener) -> Callable[[Output], None]:
    def listen(output: Output) -> None:
        listener(output)
        if len(listener.token_ids) == 3:
            engine.cancel(output.request_id)

    return listen


def test_every_row_has_the_columns_of_its_table(run: Run) -> None:
    assert run.rows.widths == {("request", len(REQUESTS)), ("step", len(STEPS)), ("decision", len(DECISIONS))}


def test_step_rows_come_in_order_and_none_is_missing(run: Run) -> None:
    assert [step["step"] for step in run.rows.steps] == list(range(len(run.rows.steps)))


def test_times_within_a_step_and_from_step_to_step_never_go_back(run: Run) -> None:
    steps = run.rows.steps
    for step in steps:
        assert 0 <= step["plan_ns"] <= step["launch_ns"] <= step["end_ns"]
        assert 0 <= step["device_ns"] <= step["end_ns"] - step["launch_ns"]
    ran = [step for step in steps if step["num_decodes"] + step["num_chunks"]]
    for column in ("plan_ns", "launch_ns", "end_ns"):
        assert sorted(step[column] for step in ran) == [step[column] for step in ran]
    assert sorted(step["plan_ns"] for step in steps) == [step["plan_ns"] for step in steps]


def test_with_a_lag_steps_are_launched_while_the_one_before_runs_and_never_without(
    run: Run, request: pytest.FixtureRequest
) -> None:
    ran = [step for step in run.rows.steps if step["num_decodes"] + step["num_chunks"]]
    pairs = list(itertools.pairwise(ran))
    early = [second["launch_ns"] < first["end_ns"] for first, second in pairs]
    lag = request.node.callspec.params["run"][1]
    assert any(early) == (lag == 1)
    # And never two steps ahead.
    assert all(third["plan_ns"] >= first["end_ns"] for first, third in zip(ran, ran[1 + lag :], strict=False))


def test_a_request_is_handed_over_before_the_step_that_its_row_says(run: Run) -> None:
    plans = {step["step"]: step["plan_ns"] for step in run.rows.steps}
    for row in run.rows.requests.values():
        before = row["before_step"]
        assert row["arrival_ns"] <= plans[before]
        assert before == 0 or row["arrival_ns"] >= plans[before - 1]
        looked_at = run.decisions(row["request_id"], *("admit", "blocked", "chunk", "refused"))
        assert all(decision["step"] >= before for decision in looked_at)


def test_a_requests_times_are_those_of_its_steps(run: Run) -> None:
    steps = {step["step"]: step for step in run.rows.steps}
    for row in run.rows.requests.values():
        if row["status"] not in ("length", "stop"):
            continue
        tokens = run.token_steps(row)[: row["output_tokens"]]
        assert row["first_scheduled_ns"] == steps[run.decisions(row["request_id"], "admit")[0]["step"]]["plan_ns"]
        assert row["first_token_ns"] == steps[tokens[0]]["end_ns"]
        assert row["finish_ns"] == steps[tokens[-1]]["end_ns"]


def test_a_requests_row_says_what_its_client_was_told(run: Run) -> None:
    for i, listener in enumerate(run.listeners):
        row, last = run.rows.requests[i], listener.outputs[-1]
        assert row["status"] == ("refused" if last.finish_reason == "error" else last.finish_reason)
        assert row["output_tokens"] == len(listener.token_ids)
        assert row["preemptions"] == len(run.decisions(i, "preempt"))
        assert row["cached_tokens"] == max(output.num_cached_tokens for output in listener.outputs)
        steps = run.token_steps(row)
        assert steps == sorted(set(steps)), "two tokens in one step"
        assert len(steps) >= len(listener.token_ids)
    assert run.rows.requests[4]["status"] == "refused"


def test_a_cancelled_requests_row_says_before_which_step_it_ended(run: Run) -> None:
    row = run.rows.requests[run.cancelled]
    assert row["status"] == "cancelled"
    end = row["end_before_step"]
    plans = {step["step"]: step["plan_ns"] for step in run.rows.steps}
    assert row["finish_ns"] == plans[end]
    assert all(d["step"] < end for d in run.rows.decisions if d["request_id"] == run.cancelled and d["kind"] != "leave")
    others = [r for i, r in run.rows.requests.items() if i != run.cancelled]
    assert {r["end_before_step"] for r in others} == {None}


def test_the_decisions_of_a_step_add_up_to_its_row(run: Run) -> None:
    for step in run.rows.steps:
        decisions = [d for d in run.rows.decisions if d["step"] == step["step"]]
        kinds = {kind: [d["tokens"] for d in decisions if d["kind"] == kind] for kind in ("chunk", "decode", "admit")}
        assert sum(kinds["chunk"]) == step["chunk_tokens"]
        assert len(kinds["chunk"]) == step["num_chunks"]
        assert sum(kinds["decode"]) == step["num_decodes"]
        assert len(kinds["admit"]) == step["num_admitted"]
        assert sum(d["kind"] == "preempt" for d in decisions) == step["num_preempted"]


def test_the_group_of_each_step_can_be_rebuilt_from_who_joined_and_who_left(run: Run) -> None:
    group: set[int] = set()
    clock = 0
    for step in run.rows.steps:
        decisions = [d for d in run.rows.decisions if d["step"] == step["step"]]
        group -= {d["request_id"] for d in decisions if d["kind"] == "leave"}
        group |= {d["request_id"] for d in decisions if d["kind"] == "join"}
        if any(d["kind"] == "decode" and d["request_id"] == -1 for d in decisions):
            clock += 1
            assert (step["decode_clock"], step["num_decodes"]) == (clock, len(group))
        else:
            assert step["decode_clock"] == 0
        group -= {d["request_id"] for d in decisions if d["kind"] == "capped"}
    assert clock > 0
