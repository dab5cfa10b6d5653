"""Highest response ratio next: the order by a slow reference, what it means for long requests, and equal sizes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.plan import Report, Step
from policies.queues.hrrn import Hrrn
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import Drive, Job

ALONE = Limits(400, 4, 1, 64, 110, prefix_caching=False)
ROOMY = Limits(400, 4, 3, 64, 110, prefix_caching=False)


def request(name: int, arrival: int, output: float, prompt: int = 1) -> Request:
    return Request(name, arrival, prompt, 10**9, hints={"output_tokens": output})


def order(work: list[Job], queue: str = "hrrn", limits: Limits = ALONE) -> list[int]:
    return [i for decision in decisions(Drive(limits, StackSpec(queue=queue), work)) for i in decision.admitted]


def by_response_ratio(requests: list[Request], now: int) -> Request:
    """The slow way, in exact fractions."""

    def ratio(one: Request) -> Fraction:
        service = round(one.hints["output_tokens"])
        return Fraction(now - one.arrival_ns + service, service)

    return min(requests, key=lambda one: (-ratio(one), one.key))


def test_a_worked_example() -> None:
    """One server, a step a token. Job 0 runs until step 6, when 1 to 3 have waited 5, 4, 1 for services 8, 4, 1: ratios
    of 1.625, 2, 2. Of the equal ones the first to come goes first, until step 10: then 1 and 3 have waited 9 and 5:
    2.125 and 6."""
    work = [Job(1, 6), Job(1, 8, arrives=1), Job(1, 4, arrives=2), Job(1, 1, arrives=5)]
    assert order(work) == [0, 2, 3, 1]
    assert order(work, "sjf") == [0, 3, 2, 1]
    assert order(work, "fcfs") == [0, 1, 2, 3]


def test_a_long_one_is_passed_only_by_those_that_come_soon_enough_after_it() -> None:
    """Services 100 and 10: when the long one has waited 1000, one passes it that came less than 900 after it."""

    def first(later: int) -> int:
        queue: Hrrn = registry.make("queue", "hrrn")
        queue.push(request(0, 0, 100), 0)
        queue.push(request(1, later, 10), later)
        return queue.pop(1000).id

    assert [first(later) for later in (1, 899, 900, 901)] == [1, 1, 0, 0]


def test_a_long_one_is_not_starved_by_a_stream_of_short_ones_that_is_never_exhausted() -> None:
    stream = [Job(1, 2, arrives=2 * i) for i in range(60)]
    work = [Job(1, 2), Job(1, 20), *stream]
    waited = {queue: order(work, queue).index(1) for queue in ("hrrn", "sjf")}
    assert waited["sjf"] == 61  # last of all
    assert (
        waited["hrrn"] == 10
    )  # at step 20 it has waited 20, as the one in the stream has 2: ratios of 2, and it came first


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Arrivals with their service, cancellations, and admissions, with the time that passes before each."""
    kinds = st.sampled_from(["push", "push", "pop", "remove"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=60))


@settings(max_examples=80, deadline=None)
@given(events())
def test_the_order_is_that_of_exact_response_ratios_at_any_time(events: list[tuple[str, int, int]]) -> None:
    queue: Hrrn = registry.make("queue", "hrrn")
    waiting: dict[int, Request] = {}
    now = 0
    for i, (kind, wait, number) in enumerate(events):
        now += wait
        if kind == "push":
            waiting[i] = request(i, now, 1 + number % 12)
            queue.push(waiting[i], now)
        elif kind == "remove" and waiting:
            queue.remove(waiting.pop(sorted(waiting)[number % len(waiting)]))
        elif kind == "pop" and waiting:
            assert queue.pop(now) is waiting.pop(by_response_ratio(list(waiting.values()), now).id)
        assert queue.peek(now) is (by_response_ratio(list(waiting.values()), now) if waiting else None)
    while waiting:
        now += 3
        assert queue.pop(now) is waiting.pop(by_response_ratio(list(waiting.values()), now).id)
    with pytest.raises(IndexError):
        queue.pop(now)


def test_hundreds_of_different_services_are_kept_in_order() -> None:
    requests = [request(i, i * 7919 % 500, 1 + i * 31 % 300) for i in range(400)]
    queue: Hrrn = registry.make("queue", "hrrn")
    for one in requests:
        queue.push(one, 500)
        queue.push(one, 500)  # twice is once
    for now in range(1000, 1400):
        expected = by_response_ratio(requests, now)
        assert queue.pop(now) is expected
        requests.remove(expected)
    assert queue.peek(1400) is None


EQUAL = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=10)


@settings(max_examples=12, deadline=None)
@given(EQUAL, st.sampled_from(["mixed", "sarathi,chunk_size=24", "static,max_batch_size=3"]))
def test_with_equal_sizes_it_is_first_come_first_served(work: list[tuple[int, int]], scheduler: str) -> None:
    jobs = [Job(prompt, 7, arrives) for prompt, arrives in work]
    assert_same_run(ROOMY, jobs, StackSpec(scheduler, "hrrn"), StackSpec(scheduler, "fcfs"))
    short_of_memory = Limits(28, 4, 3, 64, 110, prefix_caching=False)
    assert_same_run(short_of_memory, jobs, StackSpec(scheduler, "hrrn"), StackSpec(scheduler, "fcfs"))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=2, max_size=10))
def test_work_times_wait_on_one_server_is_what_it_is_in_every_order(work: list[tuple[int, int]]) -> None:
    jobs = [Job(1, output, arrives) for output, arrives in work]
    runs = [Drive(ALONE, StackSpec(queue=queue), jobs).requests for queue in ("fcfs", "hrrn")]
    sums = {sum(r.max_tokens * (r.first_scheduled_ns - r.arrival_ns) for r in done) for done in runs}  # type: ignore[operator]
    assert len(sums) == 1


def test_a_prompt_counts_as_much_as_its_weight_says() -> None:
    def first(weight: float) -> int:
        queue: Hrrn = registry.make("queue", f"hrrn,prompt_weight={weight}")
        queue.push(request(0, 0, 4, prompt=30), 0)
        queue.push(request(1, 0, 8, prompt=10), 0)
        return queue.pop(10).id

    assert [first(weight) for weight in (0, 0.1, 0.2, 0.3)] == [0, 0, 0, 1]  # 4 + 30w against 8 + 10w


def test_a_prediction_is_of_the_time_when_it_began_to_wait_and_those_that_end_teach_the_predictor() -> None:
    queue: Hrrn = registry.make("queue", "hrrn,predictor=moving_average/window=1")
    early, late, other = (Request(i, 0, 1, 50, tenant=tenant) for i, tenant in enumerate(["a", "a", "b"]))
    queue.push(early, 0)
    queue.on_report(Report(Step(0, 0), 0, 1, 1, [(Request(9, 0, 1, 50, tenant="a"), State.STOPPED, 10)]))
    queue.push(late, 0)
    queue.push(other, 0)
    assert [queue.pop(100).id for _ in range(3)] == [1, 0, 2]  # 10 tokens, 50 as the first was predicted, 50


@pytest.mark.parametrize(
    ("knobs", "why"),
    [("prompt_weight=-1", "prompt_weight must be 0 or more"), ("predictor=oracl", "did you mean 'oracle'")],
)
def test_knobs_that_make_no_sense_are_refused(knobs: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        registry.make("queue", f"hrrn,{knobs}")
