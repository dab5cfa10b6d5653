"""Multi-Bin batching: who shares a batch, what it is worth, and that nobody is left in a bin."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.queues import multi_bin
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import STEP_NS, Drive, Job

ROOMY = Limits(4000, 4, 8, 400, 400, prefix_caching=False)


def batches(drive: Drive) -> list[list[int]]:
    return [decision.admitted for decision in decisions(drive) if decision.admitted]


def grouped(lengths: list[int], edges: list[int], size: int) -> list[list[int]]:
    """The slow way, where all come at once: go through them in order, and note each bin as it becomes full."""
    bins: dict[int, list[int]] = {}
    made = []
    for i, length in enumerate(lengths):
        members = bins.setdefault(sum(length >= edge for edge in edges), [])
        members.append(i)
        if len(members) == size:
            made.append(list(members))
            members.clear()
    return made + sorted(members for members in bins.values() if members)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(
    LENGTHS, st.integers(1, 4), st.sampled_from([[], [10], [5, 10, 20]]), st.sampled_from([0, 1]),
    st.sampled_from([1, 256]),
)  # fmt: skip
def test_those_of_a_bin_make_up_a_batch_and_the_first_full_is_the_first_served(
    lengths: list[int], size: int, edges: list[int], lag: int, newcomers: int
) -> None:
    """Also where not all of a burst are put into bins in the first plan."""
    stack = StackSpec(f"static,max_batch_size={size}", f"multi_bin,batch={size},edges={';'.join(map(str, edges))}")
    limits = Limits(4000, 4, 8, 400, 400, prefix_caching=False, lag=lag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_bin, "MOST_NEWCOMERS", newcomers)
        drive = Drive(limits, stack, [Job(1, n) for n in lengths])
    assert batches(drive) == grouped(lengths, edges, size)


def test_of_a_burst_no_more_are_put_into_bins_in_one_plan_than_a_plan_can_start() -> None:
    queue = make("queue", "multi_bin,edges=10,batch=3", block_size=4)
    for i in range(1_000):
        queue.push(Request(i, -i, 4, 20, hints={"output_tokens": float(i % 20)}), 0)
    desk = Desk(ROOMY)
    left = []
    for _ in range(5):
        queue.begin(desk.plane.view.draft(), 0)
        left.append(len(queue._new))
    assert left == [744, 488, 232, 0, 0]
    assert queue.pop(0).id == 999, "the first to come, not the first to be submitted"


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_newcomers_go_by_arrival_in_whatever_order_they_are_pushed_taken_out_and_pushed_again(
    arrivals: list[int], removed: set[int], back: set[int]
) -> None:
    queue = make("queue", "multi_bin,edges=,batch=1", block_size=4)
    requests = [Request(i, arrival, 4, 20) for i, arrival in enumerate(arrivals)]
    for request in requests:
        queue.push(request, 0)
    for i in sorted(removed):
        queue.remove(requests[i])
    for i in sorted(removed & back):
        queue.push(requests[i], 0)
    served = []
    for _ in range(12 - len(removed - back)):
        queue.begin(Desk(ROOMY).plane.view.draft(), 0)
        served.append(queue.pop(0))
    left = [request for request in requests if request.id not in removed - back]
    assert served == sorted(left, key=lambda request: request.key)
    assert queue.peek(0) is None


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 4))
def test_with_one_bin_and_full_batches_it_is_first_come_first_served(lengths: list[int], size: int) -> None:
    work = [Job(3, n) for n in lengths for _ in range(size)]
    static = f"static,max_batch_size={size}"
    one = StackSpec(static, f"multi_bin,batch={size},edges=")
    assert_same_run(ROOMY, work, one, StackSpec(static, "fcfs"))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=9))
def test_a_batch_lasts_as_long_as_its_longest_member(lengths: list[int]) -> None:
    stack = StackSpec("static,max_batch_size=2", "multi_bin,batch=2,edges=10")
    drive = Drive(ROOMY, stack, [Job(1, n) for n in lengths])
    longest = [max(lengths[i] for i in members) for members in grouped(lengths, [10], 2)]
    assert sum(step.runs for step in drive.steps) == sum(longest)


@pytest.mark.parametrize(("bins", "expected"), [(1, 64.5), (2, 52.5), (4, 46.5), (8, 43.5)])
def test_of_uniform_lengths_batches_last_as_long_as_the_papers_formula_says(bins: int, expected: float) -> None:
    """Lengths uniform on (0, 80], 4 a batch: 40 + 80 / 2k * 3/5, and half a step as they are rounded up (for one bin
    the exact mean of the longest of 4 is 64.498). 5,000 batches: the standard error is at most 0.2 steps."""
    size, draws = 4, random.Random(5)
    edges = ";".join(str(80 * i // bins + 1) for i in range(1, bins))
    queue = make("queue", f"multi_bin,batch={size},edges={edges}")
    for i in range(20_000):
        queue.push(Request(i, 0, 1, 80, hints={"output_tokens": draws.randint(1, 80)}), 0)
    plane = Drive(ROOMY, StackSpec(), [Job(1, 1)]).plane  # for a view of nothing
    longest = []
    while True:
        queue.begin(plane.view.draft(), 0)
        members = []
        while queue.peek(0) is not None:
            members.append(queue.pop(0))
        if not members:
            break
        assert len(members) == size
        longest.append(max(r.hints["output_tokens"] for r in members))
    assert len(longest) > 4990
    assert sum(longest) / len(longest) == pytest.approx(expected, abs=0.8)


def test_it_saves_steps_of_static_batches_and_none_where_nobody_waits_for_the_longest() -> None:
    """32 requests of 1 to 40 tokens, 4 at a time; 8 bins. The least that is possible is the sum of lengths / 4."""
    draws = random.Random(3)
    lengths = [draws.randint(1, 40) for _ in range(32)]
    bins = f"multi_bin,batch=4,max_wait_ms=0,edges={';'.join(str(5 * i + 1) for i in range(1, 8))}"
    limits = Limits(4000, 4, 4, 400, 400, prefix_caching=False)

    def steps(scheduler: str, queue: str) -> int:
        drive = Drive(limits, StackSpec(scheduler, queue), [Job(1, n) for n in lengths])
        return sum(step.runs for step in drive.steps)

    assert sum(lengths) / 4 == 179.5
    assert steps("static,max_batch_size=4", "fcfs") == sum(max(lengths[i : i + 4]) for i in range(0, 32, 4)) == 286
    made = grouped(lengths, list(range(6, 40, 5)), 4)
    assert steps("static,max_batch_size=4", bins) == sum(max(lengths[i] for i in members) for members in made) == 251
    assert (steps("mixed", "fcfs"), steps("mixed", bins)) == (191, 186)


def test_a_bin_that_is_not_full_is_served_once_its_first_has_waited_long_enough() -> None:
    work = [Job(1, 5), Job(1, 20), Job(1, 5), Job(1, 20), Job(1, 5)]
    drive = Drive(ROOMY, StackSpec("static,max_batch_size=2", "multi_bin,batch=2,edges=10,max_wait_ms=0.1"), work)
    assert batches(drive) == [[0, 2], [1, 3], [4]]
    assert drive.requests[4].first_scheduled_ns == 100 * STEP_NS


def test_a_rare_length_does_not_wait_for_ever_behind_common_ones() -> None:
    common = [Job(1, 5, arrives=i // 2) for i in range(100)]  # a batch comes every step, and takes five
    stack = StackSpec("static,max_batch_size=2", "multi_bin,batch=2,edges=10,max_wait_ms=0.02")
    order = batches(Drive(ROOMY, stack, [Job(1, 20), *common]))
    assert order.index([0]) == 20  # after those that were full when it had waited 20 steps


def test_a_batch_that_does_not_fit_is_served_in_parts_and_not_filled_up_with_others() -> None:
    work = [Job(30, 10), Job(30, 10), Job(30, 10), Job(1, 2), Job(1, 2), Job(1, 2)]
    limits = Limits(25, 4, 6, 200, 90, prefix_caching=False)  # two of the long ones, with their caps
    drive = Drive(limits, StackSpec("static,max_batch_size=3", "multi_bin,batch=3,edges=5"), work)
    assert batches(drive) == [[0, 1], [2], [3, 4, 5]]


def test_one_who_leaves_a_bin_leaves_a_place_and_one_who_ran_goes_with_the_next_batch() -> None:
    stack = StackSpec("static,max_batch_size=2", "multi_bin,batch=2,edges=")
    drive = Drive(ROOMY, stack, [Job(1, 9), Job(1, 9), Job(1, 9, arrives=2, cancel=4), *[Job(1, 9, arrives=5)] * 2])
    assert batches(drive) == [[0, 1], [3, 4]]
    queue = make("queue", "multi_bin,batch=2,edges=")
    ran = Request(7, 0, 1, 9)
    ran.first_scheduled_ns = 3
    queue.push(ran, 5)
    assert queue.pop(5) is ran
    assert queue.peek(5) is None


def test_a_full_batch_whose_members_are_all_cancelled_is_passed_over() -> None:
    queue = make("queue", "multi_bin,batch=2,edges=")
    requests = [Request(i, i, 1, 9) for i in range(4)]
    for request in requests:
        queue.push(request, 5)
    queue.begin(Drive(ROOMY, StackSpec(), [Job(1, 1)]).plane.view.draft(), 5)
    for request in requests[:2]:
        queue.remove(request)
    assert queue.pop(5) is requests[2]


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ("edges=64;a", "must be numbers"),
        ("edges=64;64", "must be above 0 and grow"),
        ("edges=0;64", "must be above 0 and grow"),
        ("batch=0", "batch must be at least 1"),
        ("max_wait_ms=-1", "max_wait_ms at least 0"),
        ("predictor=orakle", "did you mean 'oracle'"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make("queue", f"multi_bin,{knobs}")
