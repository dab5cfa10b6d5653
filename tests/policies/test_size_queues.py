"""Queues by size and ageing priority, and `preemptive` around them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import random_stream, registry
from policies.plan import Step
from policies.records import ALIVE
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions, steps
from tests.policies.harness import STEP_NS, Drive, Job

ALONE = Limits(400, 4, 1, 64, 110, prefix_caching=False)
ROOMY = Limits(400, 4, 3, 64, 110, prefix_caching=False)


def finish_steps(drive: Drive) -> list[int]:
    return [r.finish_ns // STEP_NS for r in drive.requests]


def test_longest_first_serves_in_the_opposite_order_of_shortest_first() -> None:
    work = [Job(1, n) for n in (3, 1, 2)]
    admitted = {q: [i for d in decisions(Drive(ALONE, StackSpec(queue=q), work)) for i in d.admitted]
                for q in ("sjf", "ljf")}  # fmt: skip
    assert admitted == {"sjf": [1, 2, 0], "ljf": [0, 2, 1]}


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_a_shorter_one_takes_the_place_of_the_longer_only_while_it_has_less_left(mode: str) -> None:
    work = [Job(1, 10), Job(1, 3, arrives=4), Job(1, 6, arrives=4)]
    drive = Drive(ALONE, StackSpec(f"preemptive,mode={mode}", "srpt"), work)
    assert finish_steps(drive) == [13, 7, 19]
    assert [r.num_preemptions for r in drive.requests] == [1, 0, 0]


def test_trail_stops_nobody_who_has_come_to_its_limit() -> None:
    def served(limit: float, arrives: int) -> int:
        work = [Job(1, 20), Job(1, 1, arrives=arrives)]
        return Drive(ALONE, StackSpec("preemptive", f"srpt,limit={limit}"), work).requests[0].num_preemptions

    assert [served(0.8, at) for at in (15, 16)] == [1, 0]  # 0.8 x 20 = 16
    assert [served(1, at) for at in (15, 16)] == [1, 1]
    assert served(0, 1) == 0


def test_a_priority_ages_by_a_class_every_so_often() -> None:
    queue = registry.make("queue", "aged_priority,age_s=2")
    low, early, late = (
        Request(i, at, 1, 1, priority=p) for i, (at, p) in enumerate([(0, 1), (1_999_999_999, 0), (2_000_000_001, 0)])
    )
    for one in (late, low, early):
        queue.push(one, 0)
    assert [queue.pop(0) for _ in range(3)] == [early, low, late]


EQUAL = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=10)


@pytest.mark.parametrize("queue", ["sjf", "ljf", "srpt", "srpt,limit=0.8", "aged_priority"])
@pytest.mark.parametrize("scheduler", ["mixed", "preemptive"])
@settings(max_examples=15, deadline=None)
@given(EQUAL)
def test_with_equal_sizes_and_classes_every_one_is_first_come_first_served(
    scheduler: str, queue: str, work: list[tuple[int, int]]
) -> None:
    jobs = [Job(prompt, 7, arrives) for prompt, arrives in work]
    assert_same_run(ROOMY, jobs, StackSpec(scheduler, queue), StackSpec(scheduler, "fcfs"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20), st.integers(0, 2)), min_size=2, max_size=10),
    st.sampled_from(["recompute", "keep"]),
)
def test_no_lower_class_runs_while_a_higher_one_waits(work: list[tuple[int, int, int]], mode: str) -> None:
    jobs = [Job(1, output, arrives, priority=priority) for output, arrives, priority in work]
    drive = Drive(ROOMY, StackSpec(f"preemptive,mode={mode}", "priority"), jobs)
    left = {r.id: job.output for r, job in zip(drive.requests, jobs, strict=True)}
    plan_ns = {step.index: step.plan_ns for step in drive.steps}
    for decision in decisions(drive):
        now = plan_ns[decision.step]
        waiting = [r for r in drive.requests if r.arrival_ns <= now and left[r.id] and r.id not in decision.tokens]
        lowest = max((drive.requests[i].priority for i in decision.tokens), default=0)
        assert all(r.priority >= lowest for r in waiting)
        for i in decision.tokens:
            left[i] -= 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 15), st.integers(0, 30)), min_size=1, max_size=10))
def test_nothing_has_a_smaller_mean_on_one_server_than_preemptive_shortest_remaining(work: list) -> None:
    """Oracle B2, on the same requests, where being stopped costs nothing."""
    jobs = [Job(1, output, arrives) for output, arrives in work]
    best = sum(finish_steps(Drive(ALONE, StackSpec("preemptive,mode=keep", "srpt"), jobs)))
    others = [StackSpec(queue=queue) for queue in ("fcfs", "sjf", "ljf")]
    others += [StackSpec("preemptive,mode=keep", queue) for queue in ("ljf", "las,quantum_ms=0", "mlfq,quantum_ms=0")]
    for stack in others:
        assert best <= sum(finish_steps(Drive(ALONE, stack, jobs)))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20), st.integers(0, 2)), min_size=2, max_size=10))
def test_work_times_wait_is_the_same_for_every_order_on_one_server(work: list[tuple[int, int, int]]) -> None:
    """Oracle B4, the conservation law, of every queue that holds nobody back: else work has been lost or put off."""
    jobs = [Job(1, output, arrives, priority=priority, tenant="ab"[priority % 2]) for output, arrives, priority in work]
    sums = {}
    for queue in set(registry.names("queue")) - {"multi_bin", "rpm"}:
        done = Drive(ALONE, StackSpec(queue=queue), jobs).requests
        sums[queue] = sum(j.output * (r.first_scheduled_ns - r.arrival_ns) for r, j in zip(done, jobs, strict=True))
    assert len(set(sums.values())) == 1, sums


class Memoryless(Drive):
    """Whether a service ends is drawn step by step, the same whoever is served: sizes have no memory."""

    def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
        super()._execute(step)
        ends = random_stream.RandomStream(3, "coin").uniform(len(self.running)) < 0.2
        running = list(self.plane.view.running.values())
        return [(r, State.STOPPED, r.num_output_tokens) for r in running if ends and r.num_output_tokens]


def test_if_sizes_have_no_memory_as_many_are_there_at_any_time_whatever_the_order() -> None:
    """Oracle B3, exact where the draws are the same: one at a time, with and without being stopped."""
    work = [Job(1, 500, 3 * i, tenant="ab"[i % 2], program=i % 3) for i in range(30)]
    limits = Limits(400, 64, 1, 64, 600, prefix_caching=False)
    stacks = [StackSpec(queue=queue) for queue in ("fcfs", "vtc", "drr")]
    stacks += [
        StackSpec("preemptive,mode=keep", q) for q in ("las,quantum_ms=0", "mlfq,quantum_ms=0.002", "plas", "ltr")
    ]
    present, finished = set(), set()
    for stack in stacks:
        drive = Memoryless(limits, stack, work)
        present.add(tuple(sum(step[place] for place in ALIVE) for step in steps(drive)))
        finished.add(tuple(request.finish_ns for request in drive.requests))
    assert len(present) == 1
    assert max(*present.pop()) > 3
    assert len(finished) >= 4, "else the orders do not differ"


FIVE = [(14, 3), (17, 5), (16, 4), (3, 5), (5, 4)]  # prompt, output
MEMORY = 28


def sum_of_ends(order: tuple[int, ...]) -> int:
    """All there at 0, a token a step, in this order as far as prompt + output fits: a plain simulation."""
    waiting, running, ends = list(order), {}, 0
    for now in itertools.count(1):
        while waiting and sum(map(sum, (FIVE[i] for i in (*running, waiting[0])))) <= MEMORY:
            i = waiting.pop(0)
            running[i] = now + FIVE[i][1] - 1
        ends += sum(now for end in running.values() if end == now)
        running = {i: end for i, end in running.items() if end > now}
        if not waiting and not running:
            return ends
    raise AssertionError


def served(queue: str, order: tuple[int, ...] = (0, 1, 2, 3, 4)) -> int:
    """The same by the real policies; `order` says who has which priority."""
    work = [Job(prompt, output, priority=order.index(i)) for i, (prompt, output) in enumerate(FIVE)]
    limits = Limits(MEMORY, 1, 5, 500, MEMORY, prefix_caching=False)
    return sum(finish_steps(Drive(limits, StackSpec(queue=queue, admission="reserve_max"), work)))


def test_shortest_output_first_is_not_best_where_memory_binds() -> None:
    """Oracle B5: of means 11.6, where the optimum of all orders is 7.2, and that by memory x time 8.6."""
    sums = {order: sum_of_ends(order) for order in itertools.permutations(range(5))}
    best = min(sums, key=lambda order: sums[order])
    assert sums[best] == served("priority", best) == 36
    by_product = tuple(sorted(range(5), key=lambda i: sum(FIVE[i]) * FIVE[i][1]))
    assert sums[by_product] == served("priority", by_product) == 43
    assert {queue: served(queue) for queue in ("fcfs", "sjf", "srpt")} == {"fcfs": 52, "sjf": 58, "srpt": 58}


@pytest.mark.parametrize("spec", ["srpt,limit=1.5", "srpt,limit=-1", "aged_priority,age_s=-1"])
def test_knobs_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(PolicyError, match="must be"):
        registry.make("queue", spec)
