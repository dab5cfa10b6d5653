"""A recorded run's arrivals and times give its decisions again; among its ends are those of clients that gave up."""

from __future__ import annotations

import pytest

from policies.control_plane import ControlPlane
from policies.records import REQUESTS, STEPS
from policies.registry import make
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from simulator.arrivals import Arrival, Cancellation, Scheduled
from simulator.costs.constant import LinearCost
from simulator.pace import Timing
from simulator.simulation import Simulation, replay
from tests.policies.harness import Log

MS = 1_000_000
COST = LinearCost(2 * MS, 100_000)


def named(columns: dict[str, str], rows: list[tuple]) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in rows]


def run(lag: int, replicas: int = 1) -> tuple[Log, list[Request]]:
    """Thirty requests in memory for a few; every third client has gone after 40 ms, and comes once more for a token."""
    log, made = Log(), []

    def again(request: Request, now: int) -> list[Arrival]:
        if request.id >= 100:
            return []
        made.append(Request(100 + request.id, now + 5 * MS, request.num_prompt_tokens, 1))
        return [Arrival(made[-1], 1, timeout_ns=40 * MS)]

    router = make("router", "round_robin") if replicas > 1 else None
    limits = Limits(10, 4, 4, 32, 40, prefix_caching=False, lag=lag)
    stacks = [StackSpec().build(block_size=4) for _ in range(replicas)]
    simulation = Simulation(limits, stacks, COST, router, recorder=log, gives_up=again, check=True)
    requests = [Request(i, i * MS, 5 + i % 7, 12) for i in range(30)]
    simulation.run(Arrival(r, 3 + r.id % 9, timeout_ns=40 * MS if r.id % 3 == 0 else None) for r in requests)
    return log, [*requests, *made]


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_client_that_gives_up_is_cancelled_then_and_may_come_again(replicas: int) -> None:
    log, requests = run(0, replicas)
    left = {r.id for r in requests if r.state is State.CANCELLED}
    assert left
    assert {i % 100 for i in left} <= set(range(0, 30, 3))
    for row in named(REQUESTS, log.requests):
        if row["request_id"] in left:
            assert row["status"] == "cancelled"
            assert row["arrival_ns"] + 40 * MS <= row["finish_ns"] < row["arrival_ns"] + 60 * MS
    again = {r.id for r in requests if r.id >= 100}
    # Who had waited for so long, also where the step in flight then brought the last token.
    late = {r.id for r in requests if r.id % 3 == 0 and r.id < 100 and r.finish_ns >= r.arrival_ns + 40 * MS}
    assert again == {100 + i for i in late}
    assert sorted(row[0] for row in log.requests) == sorted(r.id for r in requests)  # each has one row


def recorded(log: Log) -> tuple[list[tuple[int, Timing]], list[Scheduled]]:
    times = [
        (row["plan_ns"], Timing(row["launch_ns"], row["end_ns"], row["device_ns"])) for row in named(STEPS, log.steps)
    ]
    scheduled = []
    for row in named(REQUESTS, log.requests):
        request = Request(row["request_id"], row["arrival_ns"], row["prompt_tokens"], row["max_tokens"])
        gone = None if row["end_before_step"] is None else Cancellation(row["end_before_step"])
        output = row["output_tokens"] if gone is None else 1_000
        scheduled.append(Scheduled(Arrival(request, output), row["before_step"], gone))
    return times, scheduled


@pytest.mark.parametrize("lag", [0, 1])
def test_a_replay_decides_and_records_as_the_run_did(lag: int) -> None:
    log, _ = run(lag)
    assert any(row["preemptions"] for row in named(REQUESTS, log.requests))
    times, scheduled = recorded(log)
    again = Log()
    limits = Limits(10, 4, 4, 32, 40, prefix_caching=False, lag=lag)
    replay(limits, StackSpec().build(block_size=4), times, reversed(scheduled), recorder=again, check=True)
    assert again.decisions == log.decisions
    assert again.steps == log.steps
    assert sorted(again.requests, key=lambda row: row[0]) == sorted(log.requests, key=lambda row: row[0])


def test_what_an_operator_did_comes_again_before_its_step_and_after_what_came_with_it() -> None:
    log, _ = run(0)
    times, scheduled = recorded(log)
    came = {item.before_step for item in scheduled}
    at = sorted(came)[5]
    seen: list[tuple[int, int, list[int]]] = []

    def look(plane: ControlPlane, now: int) -> None:
        seen.append((plane.next_step, now, plane.live_ids))

    limits = Limits(10, 4, 4, 32, 40, prefix_caching=False)
    replay(limits, StackSpec().build(block_size=4), times, scheduled, interventions={at: [look, look]})
    (first, second) = seen
    assert first == second
    assert first[:2] == (at, times[at][0])
    assert {item.arrival.request.id for item in scheduled if item.before_step == at} <= set(first[2])
