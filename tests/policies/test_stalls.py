"""Policies that do not do their work: they plan nothing, raise, or answer no plan."""

from __future__ import annotations

import pytest

from policies.control_plane import PolicyStalled
from policies.eviction.lru import Lru
from policies.plan import FOREVER, Plan
from policies.replica_state import Limits
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS, books, make_scene


def test_a_policy_that_plans_nothing_twice_while_somebody_waits_has_stalled() -> None:
    desk = Desk(LIMITS)
    desk.submit(8)
    desk.plan(Plan())
    with pytest.raises(PolicyStalled, match="ByHand planned nothing twice in a row with 1 requests alive"):
        desk.plan(Plan())


def test_a_policy_whose_plans_are_all_refused_has_stalled_and_hears_why() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    desk.plan(Plan(chunks=[(request, 9)]))
    with pytest.raises(PolicyStalled, match="refused: 9 tokens asked for, 8 left"):
        desk.plan(Plan(chunks=[(request, 9)]))


@pytest.mark.parametrize("wake_at", [0, 20])
def test_a_time_that_is_not_in_the_future_is_no_time_to_wake_up_at(wake_at: int) -> None:
    desk = Desk(LIMITS)
    desk.now = 20
    desk.submit(8)
    desk.plan(Plan(wake_at=wake_at))
    with pytest.raises(PolicyStalled):
        desk.plan(Plan(wake_at=wake_at))


def test_a_pin_without_an_end_does_not_hide_a_stall() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    desk.run(Plan(chunks=[(request, 8)], pin=[(request, FOREVER)]), request)
    desk.submit(8)
    desk.plan(Plan())
    with pytest.raises(PolicyStalled):
        desk.plan(Plan())


def test_a_policy_that_waits_for_a_time_has_not_stalled() -> None:
    desk = Desk(LIMITS)
    desk.submit(8)
    for _ in range(5):
        assert desk.plan(Plan(wake_at=1000)).wake_at == 1000


def test_planning_nothing_is_no_stall_while_a_step_is_in_flight_or_nobody_is_there() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False, lag=1))
    for _ in range(3):
        desk.plan(Plan())
    request = desk.submit(6, cap=1)
    first = desk.plan(Plan(chunks=[(request, 6)]))
    for _ in range(3):
        desk.plan(Plan())
    desk.report(first, request)


def test_twice_in_a_row_counts_from_anew_after_a_hold_and_after_a_change_of_policies() -> None:
    desk = Desk(LIMITS)
    desk.submit(8)
    desk.plan(Plan())
    desk.plane.hold(desk.now)
    desk.plan(Plan())
    desk.plane.release(desk.now)
    desk.plan(Plan())
    desk.plane.change_policies({"eviction": Lru()}, {"eviction": "lru"}, desk.now)
    desk.plan(Plan())
    with pytest.raises(PolicyStalled):
        desk.plan(Plan())


def test_what_a_policy_raises_comes_out_and_leaves_the_replica_as_it_was() -> None:
    scene = make_scene()
    before = books(scene)

    def broken(view: object, now: int) -> Plan:
        raise KeyError("my own mistake")

    scene.desk.scheduler.answer = broken
    with pytest.raises(KeyError, match="my own mistake"):
        scene.desk.plane.plan(scene.desk.now)
    assert books(scene) == before
    assert scene.desk.run(scene.base()).num_decodes == 1


def test_a_policy_that_answers_no_plan_is_told_so() -> None:
    desk = Desk(LIMITS)
    desk.scheduler.answer = lambda view, now: None  # type: ignore[assignment,return-value]
    desk.scheduler.plan = lambda view, now: None  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(TypeError, match=r"ByHand\.plan answered None; it must return a Plan"):
        desk.plane.plan(0)
