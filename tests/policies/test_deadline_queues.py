"""Deadlines: EDF with and without shedding, and least slack first."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.control_plane import ControlPlane
from policies.costing import decode_ns, prefill_ns
from policies.deadline import deadline_ns
from policies.plan import FOREVER
from policies.queues.edf import UNATTAINABLE, Edf
from policies.queues.least_slack import LeastSlack
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import STEP_NS, Drive, Job, LinearCost
from tests.policies.test_library import jobs

ALONE = Limits(4096, 4, 1, 64, 4096, prefix_caching=False)


def order_of_service(drive: Drive) -> list[int]:
    return [i for decision in decisions(drive) for i in decision.admitted]


def finish_steps(drive: Drive) -> list[int]:
    return [(r.finish_ns or 0) // STEP_NS for r in drive.requests]


class ExactSlack(LeastSlack):
    """With the drive's own time: every step takes 1000 ns."""

    def rank(self, request: Request) -> float:
        return deadline_ns(request) - (request.hints["output_tokens"] - request.num_output_tokens) * STEP_NS


# Which deadline


def test_the_next_objective_is_the_first_token_and_then_the_end() -> None:
    request = Request(0, 100, 4, 9, slo=Slo(ttft_ns=50, e2e_ns=400))
    assert deadline_ns(request) == 150
    request._tokens += 1  # the first output token
    assert deadline_ns(request) == 500
    assert deadline_ns(Request(0, 100, 4, 9, slo=Slo(e2e_ns=400))) == 500
    assert deadline_ns(Request(0, 100, 4, 9, slo=Slo(tpot_ns=10))) == FOREVER
    assert deadline_ns(Request(0, 100, 4, 9)) == FOREVER
    request = Request(0, 100, 4, 9, slo=Slo(ttft_ns=50))
    request._tokens += 1
    assert deadline_ns(request) == 150, "it keeps its place"


# EDF


def test_the_earliest_deadline_goes_first_and_no_deadline_goes_last() -> None:
    slos = [None, Slo(ttft_ns=90_000), Slo(e2e_ns=30_000), None, Slo(ttft_ns=60_000)]
    drive = Drive(ALONE, StackSpec(queue="edf"), [Job(4, 3, slo=slo) for slo in slos])
    assert order_of_service(drive) == [2, 4, 1, 0, 3]


@settings(max_examples=30, deadline=None)
@given(jobs(), st.sampled_from([28, 400]), st.sampled_from([0, 1]), st.integers(1, 60))
def test_with_equal_objectives_edf_decides_exactly_as_fcfs(work: list[Job], blocks: int, lag: int, ttft: int) -> None:
    equal = [dataclasses.replace(job, slo=Slo(ttft_ns=ttft * STEP_NS)) for job in work]
    limits = Limits(blocks, 4, 6, 32, 110, lag=lag)
    assert_same_run(limits, equal, StackSpec(queue="edf"), StackSpec(queue="fcfs"))


@st.composite
def feasible(draw: st.DrawFn) -> list[Job]:
    """Jobs that some schedule of one server serves in time: a schedule is drawn, and deadlines are set after it.

    Each job arrives before the work of those before it can be done, so that the server is never idle.
    """
    work, total = [], 0
    for _ in range(draw(st.integers(2, 8))):
        output = draw(st.integers(1, 7))
        work.append([draw(st.integers(0, total)), output])
        total += output
    work.sort()
    left, end = [output for _, output in work], [0] * len(work)
    for slot in range(total):
        ready = [i for i, (arrives, _) in enumerate(work) if arrives <= slot and left[i]]
        i = draw(st.sampled_from(ready))
        left[i] -= 1
        end[i] = slot + 1
    spare = [draw(st.sampled_from([0, 0, 1, 4])) for _ in work]
    return [
        Job(1, output, arrives, slo=Slo(e2e_ns=(end[i] + spare[i] - arrives) * STEP_NS))
        for i, (arrives, output) in enumerate(work)
    ]


@settings(max_examples=75, deadline=None)
@given(feasible())
def test_preemptive_edf_meets_all_deadlines_that_can_be_met(work: list[Job]) -> None:
    drive = Drive(ALONE, StackSpec("preemptive,mode=keep", "edf"), work)
    for request in drive.requests:
        assert request.finish_ns is not None
        assert request.slo is not None
        assert request.finish_ns <= request.arrival_ns + (request.slo.e2e_ns or 0)


@settings(max_examples=75, deadline=None)
@given(feasible())
def test_so_does_preemptive_least_slack_where_all_decodes_take_as_long_as_the_model_says(work: list[Job]) -> None:
    """LSTF is optimal too."""
    drive = Drive(ALONE, StackSpec("preemptive,mode=keep", f"{__name__}:ExactSlack"), work)
    for request in drive.requests:
        assert request.finish_ns is not None
        assert request.finish_ns <= deadline_ns(request)


def test_without_preemption_edf_may_miss_what_can_be_met() -> None:
    work = [Job(1, 9, slo=Slo(e2e_ns=30 * STEP_NS)), Job(1, 2, arrives=1, slo=Slo(e2e_ns=3 * STEP_NS))]
    for scheduler, expected in (("mixed", [9, 11]), ("preemptive,mode=keep", [11, 3])):
        assert finish_steps(Drive(ALONE, StackSpec(scheduler, "edf"), work)) == expected


# Shedding

BUSY = Job(4, 5)  # holds the only slot until 5 steps have passed; the others come at step 1, so that it is first


def shed(queue: str, *work: Job) -> Drive:
    return Drive(ALONE, StackSpec(queue=queue), [BUSY, *work])


def late(spare: int, droppable: bool = True, prompt: int = 8) -> Job:
    """A request that has `spare` ns left once its prefill, by the cost model, has started at the end of BUSY."""
    start = 5 * STEP_NS - STEP_NS
    return Job(
        prompt, 3, arrives=1, slo=Slo(ttft_ns=start + prefill_ns(LinearCost(), prompt) + spare, droppable=droppable)
    )


def test_to_the_nanosecond_a_request_is_dropped_once_its_prefill_alone_would_miss_the_deadline() -> None:
    drive = shed("edf,shed=drop", late(0), late(-1))
    assert [drive.status(i) for i in range(3)] == ["length", "length", "dropped"]
    assert drive.requests[2].finish_ns == 5 * STEP_NS
    dropped = [item for step in drive.steps for item in step.dropped]
    assert [(r.id, why) for r, why in dropped] == [(2, UNATTAINABLE)]


def test_a_lost_request_that_must_not_be_dropped_waits_behind_those_without_objective() -> None:
    for queue in ("edf,shed=drop", "edf,shed=demote"):
        drive = shed(queue, late(-1, droppable=False), late(900_000), Job(4, 3, arrives=1))
        assert order_of_service(drive) == [0, 2, 1, 3], "1 has arrived before 3, and both have no deadline now"
    drive = shed("edf,shed=demote", late(-1, droppable=True), Job(4, 3, arrives=1))
    assert [drive.status(i) for i in range(3)] == ["length"] * 3
    assert order_of_service(shed("edf", late(-1), late(900_000), Job(4, 3, arrives=1))) == [0, 1, 2, 3]


def test_a_prefix_hit_counts_towards_what_can_still_be_met() -> None:
    keys = tuple(bytes([i]) * 8 for i in range(8))
    full, hit = prefill_ns(LinearCost(), 33), prefill_ns(LinearCost(), 1, 32)
    assert hit < full
    slo = Slo(ttft_ns=4 * STEP_NS + hit, droppable=True)
    for caching, expected in ((True, "length"), (False, "dropped")):
        limits = dataclasses.replace(ALONE, prefix_caching=caching)
        work = [Job(33, 5, keys=keys), Job(33, 2, arrives=1, keys=keys, slo=slo)]
        assert Drive(limits, StackSpec(queue="edf,shed=drop"), work).status(1) == expected


def test_whoever_had_its_first_token_in_time_is_not_shed_when_it_comes_back() -> None:
    work = [Job(20, 40, slo=Slo(ttft_ns=2 * STEP_NS, droppable=True), arrives=i) for i in range(3)]
    drive = Drive(Limits(24, 4, 6, 32, 110, prefix_caching=False), StackSpec(queue="edf,shed=drop"), work)
    assert sum(r.num_preemptions for r in drive.requests) > 0
    assert all(r.state.value == "length" for r in drive.requests if r.first_token_ns is not None)


def test_a_thousand_lost_requests_cost_each_step_one_look() -> None:
    """Only the head is looked at: those behind have later deadlines."""
    looks = []

    class Counting(LinearCost):
        def step_ns(self, shape: object) -> int:
            looks.append(shape)
            return super().step_ns(shape)  # type: ignore[arg-type]

    stack = StackSpec(queue="edf,shed=drop").build(block_size=4)
    plane = ControlPlane(ALONE, stack, cost=Counting())
    plane.submit(Request(0, 0, 4, 9), 0)
    plane.plan(0)
    for i in range(1, 1001):
        plane.submit(Request(i, 1, 8, 9, slo=Slo(ttft_ns=1_000_000 + i, droppable=True)), 1)
    looks.clear()
    plane.plan(1)
    assert len(looks) == 1


def test_knobs_out_of_range_are_refused() -> None:
    for text in ("edf,shed=maybe", "least_slack,batch=0"):
        with pytest.raises(PolicyError, match="must be"):
            make("queue", text)
    assert not Edf().needs_cost
    assert Edf("drop").needs_cost
    assert LeastSlack.needs_cost
    assert StackSpec(queue="edf,shed=demote").build().needs_cost() == "Mixed"


# Least slack


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(5, 60), st.booleans()), min_size=2, max_size=10),
    st.sampled_from([0, 1]),
)
def test_with_equal_sizes_least_slack_decides_exactly_as_edf(drawn: list[tuple[int, int, bool]], lag: int) -> None:
    whole = drawn[0][2]  # all objectives are of one kind, so that what remains is the same for all
    work = [
        Job(12, 9, arrives, slo=Slo(e2e_ns=at * STEP_NS) if whole else Slo(ttft_ns=at * STEP_NS))
        for arrives, at, _ in drawn
    ]
    limits = Limits(400, 4, 2, 32, 110, prefix_caching=False, lag=lag)
    assert_same_run(limits, work, StackSpec(queue="least_slack"), StackSpec(queue="edf"))


def test_the_longer_request_goes_first_if_it_has_less_slack() -> None:
    work = [BUSY, Job(4, 2, 1, slo=Slo(e2e_ns=60_000)), Job(4, 200, 1, slo=Slo(e2e_ns=70_000))]
    assert order_of_service(Drive(ALONE, StackSpec(queue="edf"), work)) == [0, 1, 2]
    assert order_of_service(Drive(ALONE, StackSpec(queue="least_slack"), work)) == [0, 2, 1]


def test_the_slack_is_the_least_of_those_of_its_objectives() -> None:
    queue, cost = LeastSlack(), LinearCost()
    queue._cost = cost
    prefill, decode = prefill_ns(cost, 8), decode_ns(cost, 1, 8 + 4)
    request = Request(0, 1000, 8, 9, hints={"output_tokens": 9}, slo=Slo(ttft_ns=50_000, e2e_ns=40_000))
    assert queue.rank(request) == 1000 + 40_000 - prefill - 8 * decode
    request.slo = Slo(ttft_ns=10_000, e2e_ns=40_000)
    assert queue.rank(request) == 1000 + 10_000 - prefill
    request.slo = None
    assert queue.rank(request) == FOREVER


def test_the_order_of_live_slacks_never_changes_while_requests_wait() -> None:
    """The fast path against the definition: slack recomputed at every later time gives the order of the ranks."""
    queue, cost = LeastSlack(), LinearCost()
    queue._cost = cost
    waiting = [
        Request(i, 7 * i, 1 + (i * 37) % 50, 1 + (i * 91) % 70, slo=Slo(e2e_ns=(i * 7919) % 90_000)) for i in range(60)
    ]
    for request in waiting:
        queue.push(request, 0)

    def slack(request: Request, now: int) -> int:
        left = request.max_tokens - 1
        service = prefill_ns(cost, request.num_tokens) + left * decode_ns(cost, 1, request.num_tokens + left // 2)
        return deadline_ns(request) - now - service

    ranked = [queue.pop(0) for _ in waiting]
    for now in (0, 10_000, 10_000_000):
        assert ranked == sorted(waiting, key=lambda r: (slack(r, now), r.key))


def test_requests_that_came_before_the_first_plan_are_ranked_by_it_and_can_be_removed() -> None:
    work = [Job(4, 3, slo=Slo(e2e_ns=n * STEP_NS), cancel=0 if n == 5 else None) for n in (50, 5, 20)]
    drive = Drive(ALONE, StackSpec(queue="least_slack"), work)
    assert order_of_service(drive) == [2, 0]
    assert drive.status(1) == "cancelled"
