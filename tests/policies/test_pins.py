"""Pinned requests: their blocks outlive them until a time comes."""

from __future__ import annotations

from policies.plan import FOREVER, Plan
from policies.replica_state import Limits
from policies.request import State
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS


def test_a_pinned_request_keeps_its_blocks_after_its_end_until_the_time_comes() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    step = desk.run(Plan(chunks=[(request, 8)], pin=[(request, 35)]), request)
    assert request.state is State.STOPPED
    assert desk.plane.num_free_blocks == 18
    assert step.wake_at == 35
    desk.now = 34
    step = desk.plan(Plan())
    assert (desk.plane.num_free_blocks, step.wake_at) == (18, 35)
    desk.now = 35
    step = desk.plan(Plan())
    assert (desk.plane.num_free_blocks, step.wake_at) == (20, None)


def test_the_earlier_of_the_policys_time_and_the_first_pins_end_is_when_to_wake() -> None:
    desk = Desk(LIMITS)
    a, b = desk.submit(4), desk.submit(4)
    plan = Plan(chunks=[(a, 4), (b, 4)], pin=[(a, 500), (b, 400)], wake_at=300)
    assert desk.run(plan).wake_at == 300
    assert desk.run(Plan(decode_all=True, wake_at=450)).wake_at == 400


def test_a_pin_is_lifted_by_a_time_that_has_passed() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    desk.run(Plan(chunks=[(request, 8)], pin=[(request, FOREVER)]), request)
    assert desk.plane.num_free_blocks == 18
    desk.plan(Plan(pin=[(request, desk.now)]))
    assert desk.plane.num_free_blocks == 20


def test_blocks_of_a_lifted_pin_are_there_for_the_same_plan() -> None:
    desk = Desk(Limits(4, 4, 4, 32, 16, prefix_caching=False))
    request = desk.submit(12)
    desk.run(Plan(chunks=[(request, 12)], pin=[(request, FOREVER)]), request)
    other = desk.submit(12)
    assert desk.plan(Plan(chunks=[(other, 12)])).refused == [(other, "no blocks")]
    step = desk.plan(Plan(pin=[(request, desk.now)], chunks=[(other, 12)]))
    assert step.refused == []


def test_a_pin_without_an_end_is_no_time_to_wake_up_at() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    step = desk.run(Plan(chunks=[(request, 8)], pin=[(request, FOREVER)]), request)
    assert step.wake_at is None
