"""Changing the policies of a replica that is running loses nobody, keeps every order, and can be done over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.control_plane import ControlPlane
from policies.eviction.lru import Lru
from policies.plan import Plan
from policies.prefix import block_keys
from policies.queues.fcfs import Fcfs
from policies.records import DECISIONS, REQUESTS
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.schedulers.mixed import Mixed
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.harness import Drive, Job, Log
from tests.policies.test_control_plane import ADMISSIONS, SCHEDULERS, jobs

Act = Callable[[ControlPlane, int], object]


class Operated(Drive):
    """A drive in which somebody acts on the replica before some plans, after what arrives before them."""

    def __init__(self, limits: Limits, stack: StackSpec, work: list[Job], acts: dict[int, Act]) -> None:
        self.acts = dict(acts)
        super().__init__(limits, stack, work)

    def _deliver(self, now: int) -> None:
        super()._deliver(now)
        act = self.acts.pop(self.plane.next_step, None)
        if act is not None:
            act(self.plane, now)


def _change(**roles: str) -> Act:
    def act(plane: ControlPlane, now: int) -> None:
        spec, policies = StackSpec().rebuilt(roles, block_size=plane.limits.block_size)
        plane.change_policies(policies, {role: spec.as_dict()[role] for role in roles}, now)

    return act


def _flush(plane: ControlPlane, now: int) -> None:
    plane.flush(now)


changes = st.one_of(
    st.builds(_change, scheduler=st.sampled_from(SCHEDULERS)),
    st.builds(_change, scheduler=st.sampled_from(SCHEDULERS), queue=st.sampled_from(["fcfs", "priority", "sjf"])),
    st.builds(_change, admission=st.sampled_from(ADMISSIONS)),
    st.builds(_change, eviction=st.just("lru"), preemption=st.just("last_admitted")),
    st.just(_flush),
)


@settings(max_examples=150)
@given(
    jobs(),
    st.sampled_from(SCHEDULERS),
    st.dictionaries(st.integers(0, 60), changes, max_size=6),
    st.integers(30, 60),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_every_request_ends_with_its_tokens_whatever_is_changed_when(
    work: list[Job], scheduler: str, acts: dict[int, Act], num_blocks: int, lag: int, caching: bool
) -> None:
    limits = Limits(num_blocks, 4, 6, 32, 110, prefix_caching=caching, lag=lag)
    drive = Operated(limits, StackSpec(scheduler), work, acts)
    for i, job in enumerate(work):
        status = drive.status(i)
        if status in ("stop", "length"):
            assert drive.output_tokens(i) == job.output
        else:
            assert status == "refused" or (status == "cancelled" and job.cancel is not None)
    assert drive.plane.num_live == 0
    assert not drive.plane.view.running
    # What static batching pinned is given back, or it would be gone for good under another scheduler.
    rows = [dict(zip(DECISIONS, row, strict=True)) for row in drive.log.decisions]
    schedulers = [scheduler, *(row["reason"] for row in rows if row["kind"] == "swap" and "scheduler" in row["reason"])]
    if "static" not in schedulers[-1]:
        assert drive.plane.num_free_blocks == num_blocks


def test_the_new_scheduler_hears_of_who_waits_in_order_of_arrival() -> None:
    heard: list[tuple[int, int]] = []

    class Listening(Mixed):
        def add(self, request: Request, now: int) -> None:
            heard.append(request.key)
            super().add(request, now)

    plane = ControlPlane(Limits(8, 4, 1, 32, 32), StackSpec(queue="priority").build(block_size=4), check=True)
    for i, arrival in enumerate((5, 5, 3, 4)):
        plane.submit(Request(i, arrival, 4, 8, priority=-i), 5)
    plane.plan(6)  # request 3, the most urgent one, runs
    plane.change_policies({"scheduler": Listening(Fcfs())}, {"scheduler": "listening"}, 7)
    assert heard == [(3, 2), (5, 0), (5, 1)]
    assert list(plane.view.running) == [3]


def test_the_new_eviction_lets_blocks_go_in_the_order_of_the_old_one() -> None:
    plane = ControlPlane(Limits(16, 4, 4, 64, 64), StackSpec().build(block_size=4), check=True)
    for i in range(3):
        plane.submit(Request(i, 10 + i, 9, 1), 10 + i, block_keys([i] * 9, 4))
        plane.plan(10 + i)
        plane.cancel(i, 10 + i)
    pool = plane._state.pool
    assert pool.num_idle == 6
    old = pool.eviction
    assert isinstance(old, Lru)
    expected = [block.id for block in old._idle.values()]
    plane.change_policies({"eviction": Lru()}, {"eviction": "lru"}, 20)
    assert isinstance(pool.eviction, Lru)
    assert pool.eviction is not old
    assert [block.id for block in pool.eviction._idle.values()] == expected
    assert plane.match(block_keys([1] * 9, 4)) == 2  # still found
    assert plane.flush(21) == 6
    assert plane.match(block_keys([1] * 9, 4)) == 0


class Refusing(Mixed):
    def add(self, request: Request, now: int) -> None:
        raise LookupError("not here")


class RefusingEviction(Lru):
    def on_idle(self, block: Any, now: int) -> None:
        raise LookupError("not here")


def test_a_policy_that_fails_while_it_is_taught_changes_nothing() -> None:
    stack = StackSpec().build(block_size=4)
    plane = ControlPlane(Limits(16, 4, 1, 64, 64), stack, check=True)
    before = (stack.scheduler, stack.admission, stack.eviction)
    plane.submit(Request(0, 0, 9, 4), 0, block_keys([0] * 9, 4))
    plane.plan(1)
    plane.cancel(0, 2)
    plane.submit(Request(1, 2, 9, 4), 2)
    for role, policy in (("scheduler", Refusing(Fcfs())), ("eviction", RefusingEviction())):
        with pytest.raises(LookupError):
            plane.change_policies({role: policy}, {role: "bad"}, 3)
    assert (stack.scheduler, stack.admission, stack.eviction) == before
    assert plane._state.pool.eviction is before[2]
    assert plane.plan(4).admitted  # and the old ones go on
    with pytest.raises(ValueError, match="no router to change"):
        plane.change_policies({"router": object()}, {}, 5)


def test_a_hold_runs_nothing_and_a_release_goes_on() -> None:
    log = Log()
    plane = ControlPlane(Limits(16, 4, 4, 64, 64), StackSpec().build(block_size=4), recorder=log, check=True)
    plane.submit(Request(0, 0, 8, 4), 0)
    plane.hold(0)
    for now in range(1, 5):  # a scheduler that planned nothing so often would be said to have stalled
        assert not plane.plan(now).runs
    plane.release(5)
    assert plane.plan(6).admitted
    named = [dict(zip(DECISIONS, row, strict=True)) for row in log.decisions]
    assert [(row["step"], row["kind"]) for row in named if row["request_id"] == -1] == [(0, "hold"), (4, "release")]


def test_what_an_operator_does_stands_in_the_record_before_the_plan_that_follows() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80))
    cached = desk.submit(9, keys=tuple(block_keys([1] * 8, 4)))
    desk.run(Plan(chunks=[(cached, 9)]), cached)
    desk.plane.change_policies({"eviction": Lru()}, {"eviction": "lru", "admission": "watermark"}, desk.now)
    desk.plane.hold(desk.now)
    held = [desk.plane.held]
    desk.plane.release(desk.now)
    held.append(desk.plane.held)
    assert held == [True, False]
    assert [desk.plane.flush(desk.now), desk.plane.flush(desk.now)] == [2, 0]
    told = [dict(zip(DECISIONS, row, strict=True)) for row in desk.log.decisions]
    acts = [(row["step"], row["kind"], row["tokens"], row["reason"]) for row in told if row["request_id"] == -1]
    assert acts == [
        (1, "swap", 0, "eviction: lru; admission: watermark"),
        (1, "hold", 0, ""),
        (1, "release", 0, ""),
        (1, "flush", 2, ""),
        (1, "flush", 0, ""),
    ]


CALLS: dict[str, Act] = {
    "submit": lambda plane, now: plane.submit(Request(9, now, 4, 4), now),
    "cancel": lambda plane, now: plane.cancel(0, now),
    "plan": lambda plane, now: plane.plan(now),
    "change": lambda plane, now: plane.change_policies({"eviction": Lru()}, {"eviction": "lru"}, now),
    "hold": lambda plane, now: plane.hold(now),
    "release": lambda plane, now: plane.release(now),
    "flush": lambda plane, now: plane.flush(now),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_call_takes_time_back(call: str) -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80))
    desk.now = 50
    desk.submit(8)
    with pytest.raises(AssertionError, match="time went back from 50 to 49"):
        CALLS[call](desk.plane, 49)
    CALLS[call](desk.plane, 50)


def test_a_request_stopped_from_outside_is_recorded_as_one_that_stopped() -> None:
    ended: list[Request] = []
    log = Log()
    plane = ControlPlane(Limits(16, 4, 4, 64, 64), StackSpec().build(), recorder=log, on_end=ended.append, check=True)
    plane.submit(Request(0, 0, 8, 40), 0)
    plane.plan(1)
    assert plane.cancel(0, 2, 1, State.STOPPED)
    assert ended[0].state is State.STOPPED
    assert plane.num_free_blocks == 16
    row = dict(zip(REQUESTS, log.requests[0], strict=True))
    assert (row["status"], row["output_tokens"], row["end_before_step"]) == ("stop", 1, 1)


def test_a_stack_with_changes_has_new_objects_for_these_alone() -> None:
    spec, policies = StackSpec().rebuilt({"queue": "priority", "admission": "reserve_max"})
    assert set(policies) == {"scheduler", "admission"}
    assert spec.as_dict()["queue"] == "priority"
    assert spec.as_dict()["scheduler"] == StackSpec().scheduler
    with pytest.raises(PolicyError, match="no role 'router'"):
        StackSpec().rebuilt({"router": "round_robin"})
    with pytest.raises(PolicyError):
        StackSpec().rebuilt({"queue": "sjf,predictor=oracle"})
