"""Preempted requests that keep their blocks, and those that a step in flight still computes for."""

from __future__ import annotations

import pytest

from policies.plan import Mode, Plan, Step
from policies.replica_state import Limits
from policies.request import Request, State
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS, make_scene


def test_a_paused_request_keeps_its_blocks_and_goes_on_where_it_stopped() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(6)
    desk.run(Plan(chunks=[(request, 6)]))
    desk.run(Plan(decode_all=True))
    blocks = list(request._blocks)
    other = desk.submit(4)
    step = desk.run(Plan(preempt=[(request, Mode.KEEP)], chunks=[(other, 4)]))
    assert step.preempted == [(request, Mode.KEEP)]
    assert step.left == [request]
    assert request.state is State.PAUSED
    assert (request.num_computed_tokens, request._blocks) == (7, blocks)
    assert desk.scheduler.queue == [request]
    assert desk.plane.num_waiting == 0
    step = desk.run(Plan(decode_all=True, resume=[request]))
    assert step.resumed == [request]
    assert step.num_decodes == 2
    assert (request.num_computed_tokens, request.num_output_tokens) == (8, 3)
    assert request.num_preemptions == 1


def test_the_blocks_that_a_paused_request_keeps_can_be_taken_from_it() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(6)
    desk.run(Plan(chunks=[(request, 6)]))
    other = desk.submit(4)
    desk.run(Plan(preempt=[(request, Mode.KEEP)], chunks=[(other, 4)]))
    free = desk.plane.num_free_blocks
    step = desk.run(Plan(decode_all=True, preempt=[(request, Mode.RECOMPUTE)]))
    assert step.preempted == [(request, Mode.RECOMPUTE)]
    assert request.state is State.WAITING
    assert desk.plane.num_free_blocks == free + 2 - 1  # its two come back, and the other's decode opens one
    assert desk.scheduler.queue == [request]
    assert desk.plane.num_waiting == 1
    step = desk.run(Plan(decode_all=True, chunks=[(request, 7)]))
    assert [(c.start, c.num_tokens, c.samples) for c in step.chunks] == [(0, 7, True)]


def test_a_request_paused_in_its_prefill_goes_on_with_its_next_chunk() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(20)
    desk.run(Plan(chunks=[(request, 6)]))
    other = desk.submit(4)
    desk.run(Plan(preempt=[(request, Mode.KEEP)], chunks=[(other, 4)]))
    step = desk.run(Plan(resume=[request], chunks=[(request, 14)]))
    assert [(c.start, c.num_tokens, c.samples) for c in step.chunks] == [(6, 14, True)]


def test_resuming_without_a_slot_is_refused_and_the_request_stays_paused() -> None:
    desk = Desk(Limits(20, 4, 1, 32, 80, prefix_caching=False))
    request = desk.submit(6)
    desk.run(Plan(chunks=[(request, 6)]))
    other = desk.submit(4)
    desk.run(Plan(preempt=[(request, Mode.KEEP)], chunks=[(other, 4)]))
    step = desk.run(Plan(decode_all=True, resume=[request]))
    assert step.refused == [(request, "slots")]
    assert request.state is State.PAUSED
    assert desk.scheduler.queue == [request]


def test_a_paused_request_can_be_cancelled() -> None:
    scene = make_scene()
    assert scene.desk.plane.cancel(scene.paused.id, scene.desk.now)
    assert scene.paused.state is State.CANCELLED
    assert scene.paused.num_blocks == 0
    assert scene.paused not in scene.desk.scheduler.queue


def two_in_flight() -> tuple[Desk, Request, Step]:
    """A request preempted while the step that samples its first token is still running."""
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False, lag=1))
    request = desk.submit(6)
    return desk, request, desk.plan(Plan(chunks=[(request, 6)]))


@pytest.mark.parametrize("mode", [Mode.RECOMPUTE, Mode.KEEP])
def test_a_preempted_request_cannot_run_while_a_step_in_flight_computes_for_it(mode: Mode) -> None:
    desk, request, first = two_in_flight()
    other = desk.submit(4)
    second = desk.plan(Plan(preempt=[(request, mode)], chunks=[(other, 4)]))
    assert not desk.plane.view.settled(request)
    again = Plan(resume=[request]) if mode is Mode.KEEP else Plan(chunks=[(request, 7)])
    again.decode_all = True
    step = desk.plan(again)
    assert step.refused == [(request, "a step in flight still computes for it")]
    assert desk.scheduler.queue == [request]
    desk.report(first)
    assert desk.plane.view.settled(request)
    again = Plan(resume=[request]) if mode is Mode.KEEP else Plan(chunks=[(request, 7)])
    step = desk.plan(again)
    assert step.refused == []
    desk.report(second)


def test_a_request_whose_last_token_is_on_its_way_has_nothing_left_to_compute() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False, lag=1))
    request = desk.submit(6, cap=1)
    desk.plan(Plan(chunks=[(request, 6)]))
    step = desk.plan(Plan(chunks=[(request, 1)], decodes=[request]))
    assert sorted(step.refused, key=lambda r: r[1]) == [(request, "not a decode"), (request, "nothing left to compute")]
    assert not step.runs


def test_a_request_that_ends_while_it_waits_after_a_preemption_leaves_the_queue() -> None:
    desk, request, first = two_in_flight()
    other = desk.submit(4)
    desk.plan(Plan(preempt=[(request, Mode.RECOMPUTE)], chunks=[(other, 4)]))
    assert desk.scheduler.queue == [request]
    desk.report(first, request)
    assert request.state is State.STOPPED
    assert desk.scheduler.queue == []


def test_one_that_goes_elsewhere_after_its_first_token_and_is_preempted_by_then_gets_its_second_one_here() -> None:
    """It has to be computed again, and what that samples is its second token."""
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False, lag=1))
    request, other = Request(7, 0, 6, 10), Request(8, 0, 4, 10)
    desk.plane.submit(request, 0, hands_off=True)
    desk.plane.submit(other, 0)
    assert (request.max_tokens, request._tokens_elsewhere) == (1, 9)
    first = desk.plan(Plan(chunks=[(request, 6)]))
    second = desk.plan(Plan(preempt=[(request, Mode.RECOMPUTE)], chunks=[(other, 4)]))
    assert second.preempted == [(request, Mode.RECOMPUTE)]
    desk.report(first)
    assert request.state is State.WAITING
    assert (request.max_tokens, request._tokens_elsewhere) == (2, 8)
    step = desk.plan(Plan(decode_all=True, chunks=[(request, 7)]))
    assert [(c.request, c.start, c.num_tokens, c.samples) for c in step.chunks] == [(request, 0, 7, True)]
