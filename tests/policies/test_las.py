"""Least attained service, and the service times that it and other queues go by."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.control_plane import ControlPlane
from policies.plan import Mode, Plan, Report, Step
from policies.queues.las import Las
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.decisions import decisions
from tests.policies.harness import STEP_NS, Drive, Job, LinearCost
from tests.policies.test_preemptive import LIMITS, SHAPES, jobs


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@settings(max_examples=60, deadline=None)
@given(
    limits=LIMITS,
    shapes=SHAPES,
    queue=st.sampled_from(
        ["las,quantum_ms=0", "las,quantum_ms=0.003", "mlfq,quantum_ms=0", "mlfq,quantum_ms=0.001,alpha_ms=0.001"]
    ),
    chunk=st.sampled_from([0, 4]),
)
def test_in_little_memory_nobody_stops_others_for_ever(
    limits: Limits, shapes: list[tuple[int, int, int]], mode: str, queue: str, chunk: int
) -> None:
    stack = StackSpec(f"preemptive,mode={mode},long_prefill_threshold={chunk}", queue)
    drive = Drive(limits, stack, jobs(shapes), max_plans=3_000)
    assert all(request.state is State.LENGTH for request in drive.requests)
    assert not [step.refused for step in drive.steps if step.refused]


def test_two_equal_requests_take_turns_of_a_quantum() -> None:
    limits = Limits(400, 4, 1, 64, 110, prefix_caching=False)
    drive = Drive(limits, StackSpec("preemptive,mode=keep", "las,quantum_ms=0.003"), [Job(4, 9) for _ in range(2)])
    ran = [i for d in decisions(drive) for i in d.tokens]
    assert ran == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3


def test_what_is_computed_again_is_not_service() -> None:
    """Of 43 tokens 42 were computed before: of the six chunks that compute them again the last has 1 new one of 3."""
    limits = Limits(400, 4, 1, 8, 110, prefix_caching=False)
    stack = StackSpec("preemptive", "las,quantum_ms=0").build(block_size=4)
    plane = ControlPlane(limits, stack, check=True)
    queue = stack.scheduler.queue  # type: ignore[attr-defined]
    long, short, now = Request(0, 0, 40, 9), Request(1, 0, 1, 1), 0

    def step() -> None:
        nonlocal now
        planned = plane.plan(now)
        now += STEP_NS
        ended = [(short, State.LENGTH, 1)] if any(c.request is short for c in planned.chunks) else []
        plane.report(Report(planned, now - STEP_NS, now, STEP_NS, ended))

    plane.submit(long, 0)
    for _ in range(7):
        step()
    assert queue._service.of(long) == 7 * STEP_NS
    plane.submit(short, now)
    step()
    assert short.state is State.LENGTH
    for _ in range(5):
        step()
        assert queue._service.of(long) == 7 * STEP_NS
    assert long.num_computed_tokens == 40
    step()
    assert (long.num_computed_tokens, long.num_output_tokens) == (43, 4)
    assert queue._service.of(long) == 7 * STEP_NS + STEP_NS // 3


def test_with_a_lag_too_who_is_back_in_the_very_next_plan_is_charged_for_its_one_new_token() -> None:
    """Of 12 tokens that are computed at once 11 were computed before, when the step that stopped it is not reported."""
    desk, queue = Desk(Limits(40, 4, 4, 64, 100, prefix_caching=False, lag=1)), Las(quantum_ms=0)
    for name, call in {"add": queue.push, "on_report": queue.on_report}.items():
        setattr(desk.scheduler, name, call)
    queue.begin(desk.plane.view.draft(), 0)
    request, other = desk.submit(10), desk.submit(5)

    def report(step: Step) -> None:
        desk.now += 1_200
        desk.plane.report(Report(step, desk.now - 1_200, desk.now, 1_200, []))

    first = desk.plan(Plan(chunks=[(request, 10), (other, 5)]))
    second = desk.plan(Plan(decode_all=True))
    report(first)
    third = desk.plan(Plan(preempt=[(request, Mode.RECOMPUTE)], decodes=[other]))
    report(second)
    fourth = desk.plan(Plan(chunks=[(request, 12)], decodes=[other]))
    assert [(c.start, c.num_tokens, c.samples) for c in fourth.chunks] == [(0, 12, True)]
    report(third)
    report(fourth)
    assert queue._service.of(request) == 2 * 1_200 + 1_200 // 12


@pytest.mark.parametrize("lag", [0, 1])
@settings(max_examples=25, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 9), st.none() | st.integers(1, 20)),
        min_size=1,
        max_size=8,
    )
)
def test_nothing_is_kept_of_requests_that_have_ended(lag: int, work: list[tuple[int, int, int, int | None]]) -> None:
    made = [Job(p, n, at, cancel=None if stop is None else at + stop) for p, n, at, stop in work]
    made.append(Job(1, 30, 9))  # so that there are reports after the last cancellation
    limits = Limits(40, 4, 3, 16, 110, prefix_caching=False, lag=lag)
    stack = StackSpec("preemptive", "las,quantum_ms=0.002")
    drive = Drive(limits, stack, made)
    queue = drive.stack.scheduler.queue  # type: ignore[attr-defined]
    assert isinstance(queue, Las)
    assert not queue._service._own
    assert not queue._service._joined_at
    assert not queue._computed
    assert not queue._held


@pytest.mark.parametrize("queue", ["las", "mlfq", "plas"])
def test_who_decodes_when_the_queue_is_put_in_is_charged_from_then_on(queue: str) -> None:
    limits = Limits(400, 4, 2, 64, 110, prefix_caching=False)
    plane = ControlPlane(limits, StackSpec().build(block_size=4), cost=LinearCost(), check=True)
    request, now = Request(0, 0, 4, 20), 0
    plane.submit(request, 0)

    def step() -> None:
        nonlocal now
        planned = plane.plan(now)
        now += STEP_NS
        plane.report(Report(planned, now - STEP_NS, now, STEP_NS, []))

    for _ in range(3):
        step()
    scheduler = StackSpec("preemptive", queue).build(block_size=4).scheduler
    plane.change_policies({"scheduler": scheduler}, {"scheduler": queue}, now)
    for _ in range(5):
        step()
    assert scheduler.queue._service.of(request) == 5 * STEP_NS  # type: ignore[attr-defined]


def test_a_negative_quantum_is_refused() -> None:
    with pytest.raises(PolicyError, match="0 or more"):
        registry.make("queue", "las,quantum_ms=-1")
