"""Learning to rank with its guard against starvation: the paper's order step by step, and where it is a simpler one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.plan import Report, Step
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import STEP_NS, Drive, Job

ALONE = Limits(400, 4, 1, 64, 110, prefix_caching=False)


def roomy(slots: int) -> Limits:
    return Limits(4000, 4, slots, 400, 110, prefix_caching=False)


def who_ran(drive: Drive) -> list[set[int]]:
    return [set(decision.tokens) for decision in decisions(drive) if decision.tokens]


def as_published(drive: Drive, scores: list[float], slots: int, threshold: int, quantum: int) -> list[set[int]]:
    """The slow way: in every step look at everybody alive, promote and demote, sort, and count."""
    left = {r.id: job.output for r, job in zip(drive.requests, drive.jobs, strict=True)}
    idle, runs, promoted = dict.fromkeys(left, 0), dict.fromkeys(left, 0), dict.fromkeys(left, False)
    steps = []
    for now in [step.plan_ns for step in drive.steps if step.runs]:
        alive = [r for r in drive.requests if r.arrival_ns <= now and left[r.id]]
        for r in alive:
            if threshold and idle[r.id] >= threshold:
                promoted[r.id], idle[r.id], runs[r.id] = True, 0, quantum
            elif runs[r.id] <= 0:
                promoted[r.id] = False
        chosen = {r.id for r in sorted(alive, key=lambda r: (not promoted[r.id], scores[r.id], r.key))[:slots]}
        for r in alive:
            idle[r.id] = 0 if r.id in chosen else idle[r.id] + 1
            if r.id in chosen:
                runs[r.id] -= promoted[r.id]
                left[r.id] -= 1
        steps.append(chosen)
    return steps


WORK = st.lists(
    st.tuples(st.integers(1, 25), st.integers(1, 6), st.integers(0, 25)), min_size=2, max_size=9
)  # output, score, arrival


@settings(max_examples=40, deadline=None)
@given(WORK, st.integers(1, 3), st.integers(0, 8), st.integers(1, 5))
def test_step_by_step_those_run_that_the_papers_algorithm_chooses(
    work: list[tuple[int, int, int]], slots: int, threshold: int, quantum: int
) -> None:
    jobs = [Job(1, output, arrives, hints={"output_tokens": score}) for output, score, arrives in work]
    queue = f"ltr,threshold={threshold},quantum={quantum}"
    drive = Drive(roomy(slots), StackSpec("preemptive,mode=keep", queue), jobs)
    scores = [float(min(score, output)) for output, score, _ in work]  # nobody declares more than the cap
    assert who_ran(drive) == as_published(drive, scores, slots, threshold, quantum)


def run_of(threshold: int, quantum: int) -> str:
    """One server. A long request (L), and short ones (s) of two tokens that never leave it to itself."""
    work = [Job(1, 12), *(Job(1, 2, arrives=2 * i) for i in range(12))]
    stack = StackSpec("preemptive,mode=keep", f"ltr,threshold={threshold},quantum={quantum}")
    return "".join("L" if 0 in step else "s" for step in who_ran(Drive(ALONE, stack, work)))


def test_who_has_not_run_for_the_threshold_runs_for_a_quantum_ahead_of_all_others() -> None:
    assert run_of(0, 1) == "s" * 24 + "L" * 12
    assert run_of(30, 3) == "s" * 24 + "L" * 12
    assert run_of(10, 4) == "ssssssssssLLLLssssssssssLLLLssssLLLL"


def test_where_the_short_ones_starve_too_the_promoted_go_by_score_again() -> None:
    """From step 15 on each short one has waited 5 steps when its turn comes."""
    assert run_of(5, 3) == "sssssLLLsssssLLssssssssssssssLLLLLLL"


def test_without_preemption_who_starves_is_the_next_to_be_admitted() -> None:
    work = [Job(1, 2), Job(1, 30), *(Job(1, 2, arrives=i) for i in range(1, 30))]

    def place(queue: str) -> int:
        return [i for d in decisions(Drive(ALONE, StackSpec(queue=queue), work)) for i in d.admitted].index(1)

    assert place("ltr,threshold=0") == 30
    assert place("ltr,threshold=9,quantum=1") == 5  # promoted after 9 steps; one of two tokens ends with the tenth


def test_several_that_starve_go_by_score_among_themselves() -> None:
    """1, 2 and 3 are promoted while 0 runs; 4 and 5 come too late for that, and are while 2 does."""
    work = [Job(1, 6), Job(1, 9), Job(1, 7), Job(1, 8), Job(1, 2, arrives=4), Job(1, 2, arrives=5)]

    def order(threshold: int) -> list[int]:
        drive = Drive(ALONE, StackSpec(queue=f"ltr,threshold={threshold}"), work)
        return [i for decision in decisions(drive) for i in decision.admitted]

    assert order(5) == [0, 2, 4, 5, 3, 1]
    assert order(0) == [0, 4, 5, 2, 3, 1]


def test_of_many_that_starve_at_once_some_are_promoted_in_each_plan() -> None:
    queue = registry.make("queue", "ltr,threshold=2")
    requests = [Request(i, 0, 1, 200 - i) for i in range(150)]
    for request in requests:
        queue.push(request, 0)
    draft = Drive(ALONE, StackSpec(), [Job(1, 1)]).plane.view.draft()
    promoted = []
    for _ in range(12):
        queue.begin(draft, 0)
        promoted.append(sum(not queue.order(request)[0][0] for request in requests))
        queue.on_report(Report(Step(0, 0), 0, 1, 1))
    assert promoted == [0, 0, 64, 128, *[150] * 8]
    assert queue.pop(0) is requests[149]


MORE_WORK = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 25)), min_size=1, max_size=10
)  # prompt, output, arrival


@settings(max_examples=15, deadline=None)
@given(MORE_WORK, st.sampled_from([18, 30, 400]), st.sampled_from([0, 1]), st.sampled_from(["mixed", "sarathi"]))
def test_with_a_perfect_ranker_and_no_guard_it_is_shortest_job_first(
    work: list[tuple[int, int, int]], blocks: int, lag: int, scheduler: str
) -> None:
    jobs = [Job(prompt, output, arrives, hints={"output_tokens": 5}) for prompt, output, arrives in work]
    limits = Limits(blocks, 4, 3, 64, 60, prefix_caching=False, lag=lag)
    perfect = StackSpec(scheduler, "ltr,threshold=0,predictor=oracle")
    assert_same_run(limits, jobs, perfect, StackSpec(scheduler, "sjf,predictor=oracle"))


@settings(max_examples=15, deadline=None)
@given(MORE_WORK, st.sampled_from([("mixed", 0), ("mixed", 3), ("preemptive", 0), ("preemptive,mode=keep", 0)]))
def test_with_one_score_for_all_it_is_first_come_first_served(
    work: list[tuple[int, int, int]], stack: tuple[str, int]
) -> None:
    scheduler, threshold = stack
    jobs = [Job(prompt, output, arrives, 20, hints={"output_tokens": 5}) for prompt, output, arrives in work]
    queue = f"ltr,threshold={threshold},quantum=2"
    assert_same_run(roomy(2), jobs, StackSpec(scheduler, queue), StackSpec(scheduler, "fcfs"))


def test_nobody_is_stopped_before_it_has_got_a_token() -> None:
    """The prompt of job 0 takes four steps; a shorter one that comes meanwhile waits for the first token."""
    limits = Limits(400, 4, 1, 10, 110, prefix_caching=False)
    drive = Drive(limits, StackSpec("preemptive", "ltr"), [Job(40, 9), Job(1, 1, arrives=2)])
    assert [decision.step for decision in decisions(drive) if decision.preempted] == [4]
    assert drive.requests[0].first_token_ns == 4 * STEP_NS


def test_a_request_is_scored_once_even_where_the_ranker_has_learnt_since() -> None:
    queue = registry.make("queue", "ltr,predictor=moving_average/window=1")
    first, second = (Request(i, i, 1, 50) for i in range(2))
    queue.push(first, 0)
    queue.on_report(Report(Step(0, 0), 0, 1, 1, [(Request(9, 0, 1, 50), State.STOPPED, 7)]))
    queue.push(second, 0)
    assert (queue.order(first), queue.order(second)) == (((True, 50.0), 0, 0), ((True, 7.0), 1, 1))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 20)), min_size=2, max_size=8),
    st.sampled_from(["preemptive", "preemptive,mode=keep"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0, 1]),
)
def test_everybody_ends_in_little_memory_where_all_are_promoted_all_the_time(
    work: list[tuple[int, int, int]], scheduler: str, threshold: int, quantum: int, lag: int
) -> None:
    limits = Limits(26, 4, 4, 16, 104, prefix_caching=False, lag=lag)
    stack = StackSpec(scheduler, f"ltr,threshold={threshold},quantum={quantum}")
    drive = Drive(limits, stack, [Job(*one) for one in work])
    assert all(request.state.value == "length" for request in drive.requests)
    queue = drive.plane.stack.scheduler.queue  # type: ignore[attr-defined]
    assert not queue._places  # nothing is kept of those that have ended


@pytest.mark.parametrize("knobs", ["threshold=-1", "quantum=0"])
def test_knobs_that_make_no_sense_are_refused(knobs: str) -> None:
    with pytest.raises(PolicyError, match=r"threshold must be 0 \(nobody is promoted\) or more, quantum at least 1"):
        registry.make("queue", f"ltr,{knobs}")
