"""Skip-join MLFQ: where requests join, when they sink, and what it is at its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.costing import prefill_ns
from policies.draft import Draft
from policies.queues.mlfq import Mlfq
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import STEP_NS, Drive, Job, LinearCost
from tests.policies.test_preemptive import LIMITS as LITTLE
from tests.policies.test_preemptive import SHAPES, jobs

LIMITS = Limits(400, 4, 2, 64, 110, prefix_caching=False, lag=0)


def run(queue: str, jobs: list[Job]) -> Drive:
    return Drive(LIMITS, StackSpec("preemptive,mode=keep", queue), jobs)


@pytest.mark.parametrize("prompt", [1, 10, 40, 90])
def test_a_request_joins_the_first_level_whose_quantum_covers_its_prefill(prompt: int) -> None:
    queue = Mlfq(quantum_ms=0.0005)
    queue._cost = LinearCost()
    need = prefill_ns(LinearCost(), prompt)
    assert queue.level(Request(0, 0, prompt, 5)) == min(i for i in range(16) if 500 * 2**i >= need)


@pytest.mark.parametrize(("steps", "level"), [(1, 0), (2, 0), (3, 1), (6, 1), (7, 2), (14, 2), (15, 3)])
def test_a_lone_request_sinks_to_the_level_whose_quanta_in_sum_cover_its_service(steps: int, level: int) -> None:
    queue, request = Mlfq(quantum_ms=0.002), Request(0, 0, 1, 50)
    queue._service._own[0] = 0
    assert queue.level(request) == 0
    for step in range(1, steps + 1):
        queue._service._own[0] = step * STEP_NS
        queue._demote(request, step)
    assert queue.level(request) == level


WORK = [Job(1 + 7 * i % 40, 3 + 11 * i % 30, i // 2) for i in range(12)]


def test_one_level_is_first_come_first_served() -> None:
    assert decisions(run("mlfq,levels=1", WORK)) == decisions(run("fcfs", WORK))
    assert decisions(run("mlfq,quantum_ms=0.002", WORK)) != decisions(run("fcfs", WORK))


def test_no_quantum_is_round_robin() -> None:
    drive = Drive(
        Limits(400, 4, 1, 64, 110, prefix_caching=False, lag=0),
        StackSpec("preemptive,mode=keep", "mlfq,quantum_ms=0"),
        [Job(4, 4) for _ in range(3)],
    )
    ran = [next(iter(d.tokens)) for d in decisions(drive) if d.tokens]
    assert sorted(ran[:3]) == [0, 1, 2]
    assert ran == ran[:3] * 4


def test_who_waits_below_the_top_is_promoted_after_alpha() -> None:
    work = [Job(40, 4), *(Job(1, 20, i) for i in range(1, 30))]
    patient, starving = run("mlfq,quantum_ms=0.001,alpha_ms=0.01", work), run("mlfq,quantum_ms=0.001,alpha_ms=0", work)

    def end(drive: Drive) -> int:
        return next(i for i, d in reversed(list(enumerate(decisions(drive)))) if 0 in d.tokens)

    assert end(patient) < end(starving)


def test_promotion_is_to_the_top_and_at_alpha_exactly() -> None:
    drive = run("mlfq,quantum_ms=0.001,alpha_ms=0.01", [Job(1, 1)])
    queue = Mlfq(quantum_ms=0.001, alpha_ms=0.01)
    queue._begun, queue._cost = True, LinearCost()
    request = Request(5, 0, 40, 4)
    queue.push(request, 100)
    low = queue.level(request)
    early, due = drive.plane.view.draft(), drive.plane.view.draft()
    queue._promote(early, 10_099)
    assert (queue.level(request), early.plan.wake_at) == (low, 10_100)
    assert low > 0
    queue._promote(due, 10_100)
    assert (queue.order(request), due.plan.wake_at) == (((0, 10_100), 0, 5), None)
    assert queue.pop(10_100) is request


def test_the_wait_of_who_is_paused_goes_on_when_its_memory_is_taken_and_of_who_is_refused_too() -> None:
    drive = run("mlfq,quantum_ms=0.001,alpha_ms=0.01", [Job(1, 1)])
    queue, request = Mlfq(quantum_ms=0.001, alpha_ms=0.01), Request(5, 0, 40, 4)

    def begin(now: int) -> int | None:
        draft = drive.plane.view.draft()
        queue.begin(draft, now)
        return draft.plan.wake_at

    queue._begun, queue._cost = True, LinearCost()
    queue.push(request, 100)
    assert begin(200) == 10_100
    queue.remove(request)  # for its memory to be taken by the plan that is made
    queue.push(request, 200)
    assert begin(300) == 10_100
    assert queue.pop(300) is request
    queue.push(request, 300)  # refused
    assert begin(400) == 10_100
    assert queue.pop(400) is request
    assert begin(500) is None  # it runs
    queue.push(request, 500)
    assert begin(600) == 10_500
    assert begin(10_500) is None
    assert queue.level(request) == 0


class Walking(Mlfq):
    """The slow way: everybody who runs is looked at before every plan."""

    def begin(self, draft: Draft, now: int) -> None:
        self._served.update(draft.view.running)
        super().begin(draft, now)


@settings(max_examples=20, deadline=None)
@given(
    limits=LITTLE,
    shapes=SHAPES,
    mode=st.sampled_from(["keep", "recompute", "swap"]),
    knobs=st.sampled_from(["quantum_ms=0", "quantum_ms=0.001,alpha_ms=0.004", "quantum_ms=0.003,alpha_ms=0.02"]),
)
def test_only_who_may_be_through_with_a_quantum_is_looked_at(
    limits: Limits, shapes: list[tuple[int, int, int]], mode: str, knobs: str
) -> None:
    scheduler = f"preemptive,mode={mode}"
    slow = StackSpec(scheduler, f"tests.policies.test_mlfq:Walking,{knobs}")
    assert_same_run(limits, jobs(shapes), StackSpec(scheduler, f"mlfq,{knobs}"), slow)
