"""A plan that cannot be carried out: the control plane refuses the item, says why, and touches nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from policies.control_plane import PolicyStalled, RequestRefused
from policies.plan import FOREVER, Mode, Plan, Step
from policies.prefix import block_keys
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request, State
from tests.policies.byhand import Desk

LIMITS = Limits(20, 4, 4, 32, 80, prefix_caching=False)


@dataclass
class Scene:
    """One request that decodes, one in mid-prefill, one paused, one waiting, one ended."""

    desk: Desk
    decode: Request
    prefill: Request
    paused: Request
    waiting: Request
    ended: Request

    def base(self) -> Plan:
        return Plan(decode_all=True, chunks=[(self.prefill, 4)])


def make_scene() -> Scene:
    desk = Desk(LIMITS)
    ended, decode, prefill, paused = desk.submit(3), desk.submit(5), desk.submit(24), desk.submit(6)
    desk.run(Plan(chunks=[(ended, 3), (decode, 5), (prefill, 8), (paused, 6)]), ended)
    desk.run(Plan(preempt=[(paused, Mode.KEEP)]))
    return Scene(desk, decode, prefill, paused, desk.submit(10), ended)


def essence(step: Step) -> tuple[object, ...]:
    """What a panel would run, without the refusals."""
    return (
        [(c.request.id, c.start, c.num_tokens, c.samples) for c in step.chunks],
        [r.id for r in step.decodes],
        step.decode_all,
        step.num_decodes,
        [r.id for r in step.joined],
        [r.id for r in step.admitted],
        [r.id for r in step.resumed],
        [(r.id, mode) for r, mode in step.preempted],
        step.shape,
    )


def books(scene: Scene) -> list[tuple[object, ...]]:
    requests = (scene.decode, scene.prefill, scene.paused, scene.waiting)
    return [(r.id, r.state, r.num_computed_tokens, r.num_tokens, list(r._blocks)) for r in requests]


def chunk(name: str, tokens: float) -> Callable[[Plan, Scene], None]:
    return lambda plan, scene: plan.chunks.append((getattr(scene, name), tokens))  # type: ignore[arg-type]


def preempt(name: str, mode: Mode) -> Callable[[Plan, Scene], None]:
    return lambda plan, scene: plan.preempt.append((getattr(scene, name), mode))


def hold_half(plan: Plan, scene: Scene) -> None:
    plan.chunks.append((scene.waiting, 4))
    plan.hold[scene.waiting.id] = 8.5  # type: ignore[assignment]


def half_a_bundle(plan: Plan, scene: Scene) -> None:
    plan.chunks.append((scene.waiting, 4))
    plan.bundles.append(frozenset({scene.waiting.id, 99}))


BAD_ITEMS: dict[str, tuple[Callable[[Plan, Scene], None], str, str]] = {
    "chunk_of_an_ended_request": (chunk("ended", 1), "ended", "not a live request"),
    "chunk_of_a_paused_request": (chunk("paused", 1), "paused", "paused and not resumed"),
    "second_chunk_of_a_running_request": (chunk("prefill", 4), "prefill", "planned twice"),
    "chunk_of_a_decode": (chunk("decode", 1), "decode", "decodes: name it in decodes, or say decode_all"),
    "no_tokens": (chunk("waiting", 0), "waiting", "0 tokens asked for, 10 left"),
    "fewer_than_no_tokens": (chunk("waiting", -3), "waiting", "-3 tokens asked for, 10 left"),
    "half_a_token": (chunk("waiting", 2.5), "waiting", "2.5 tokens, 0 to hold: not whole numbers"),
    "half_a_token_to_hold": (hold_half, "waiting", "4 tokens, 8.5 to hold: not whole numbers"),
    "more_tokens_than_are_left": (chunk("waiting", 11), "waiting", "11 tokens asked for, 10 left"),
    "more_tokens_than_the_budget": (lambda p, s: p.chunks.append((s.desk.submit(40), 30)), "new", "token budget"),
    "decode_beside_decode_all": (lambda p, s: p.decodes.append(s.decode), "decode", "planned twice"),
    "preempting_who_waits": (preempt("waiting", Mode.RECOMPUTE), "waiting", "not running"),
    "preempting_who_ended": (preempt("ended", Mode.RECOMPUTE), "ended", "not running"),
    "preempting_who_is_paused": (preempt("paused", Mode.KEEP), "paused", "not running"),
    "swap_without_a_host_tier": (preempt("decode", Mode.SWAP), "decode", "no host memory tier to swap to"),
    "resuming_who_waits": (lambda p, s: p.resume.append(s.waiting), "waiting", "not paused"),
    "resuming_who_runs": (lambda p, s: p.resume.append(s.decode), "decode", "not paused"),
    "fetching_without_a_tier": (lambda p, s: p.fetch.append((s.waiting, "host")), "waiting", "no tier to fetch from"),
    "dropping_who_ended": (lambda p, s: p.drop.append((s.ended, "late")), "ended", "not a live request"),
    "pinning_who_ended": (lambda p, s: p.pin.append((s.ended, FOREVER)), "ended", "holds no blocks any more"),
    "half_a_bundle": (half_a_bundle, "waiting", "its bundle does not fit"),
}


def test_numpys_integers_are_whole_numbers_of_tokens() -> None:
    scene = make_scene()
    plan = scene.base()
    plan.chunks.append((scene.waiting, np.int32(6)))  # type: ignore[arg-type]
    step = scene.desk.plan(plan)
    assert not step.refused
    assert [type(c.num_tokens) for c in step.chunks] == [int, int]


@pytest.mark.parametrize("plan", [Plan(wake_at=1e6), Plan(pin=[(Request(0, 0, 1, 1), 2.5)])])  # type: ignore[list-item, arg-type]
def test_a_time_that_is_no_int_is_an_error_that_names_the_policy(plan: Plan) -> None:
    scene = make_scene()
    before = books(scene)
    with pytest.raises(TypeError, match=r"\.plan named the time (1000000.0|2.5); times are nanoseconds as int"):
        scene.desk.plan(plan)
    assert books(scene) == before


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_an_item_that_cannot_be_done_is_refused_with_its_reason_and_disturbs_nobody(case: str) -> None:
    spoil, name, reason = BAD_ITEMS[case]
    good, bad = make_scene(), make_scene()
    plan = bad.base()
    spoil(plan, bad)
    expected, step = good.desk.plan(good.base()), bad.desk.plan(plan)
    subject = plan.chunks[-1][0] if name == "new" else getattr(bad, name)
    assert step.refused == [(subject, reason)]
    assert essence(step) == essence(expected)
    assert books(bad) == books(good)
    waits = subject.state in (State.WAITING, State.PAUSED)
    assert bad.desk.scheduler.queue.count(subject) == waits
    bad.desk.report(step)
    assert bad.desk.scheduler.reports[-1].step.refused == [(subject, reason)]


@pytest.mark.parametrize("times", [2, 3])
def test_a_waiting_request_that_a_plan_names_several_times_is_admitted_once(times: int) -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80))
    keys = tuple(block_keys([1] * 8, 4))
    first = desk.submit(10, keys=keys)
    desk.run(Plan(chunks=[(first, 10)]), first)
    second = desk.submit(10, keys=keys)
    step = desk.run(Plan(chunks=[(second, 2)] * times))
    assert step.refused == [(second, "planned twice")] * (times - 1)
    assert second.num_computed_tokens == 10
    assert second not in desk.scheduler.queue


def test_a_request_that_is_preempted_and_planned_again_comes_back_to_the_queue_once() -> None:
    scene = make_scene()
    victim = scene.prefill
    step = scene.desk.run(Plan(preempt=[(victim, Mode.RECOMPUTE)] * 2, chunks=[(victim, 4)]))
    assert step.preempted == [(victim, Mode.RECOMPUTE)]
    assert [reason for _, reason in step.refused] == ["not running", "planned twice"]
    assert scene.desk.scheduler.queue.count(victim) == 1
    assert victim.num_blocks == 0


def test_dropping_a_request_twice_ends_it_once() -> None:
    scene = make_scene()
    step = scene.desk.run(Plan(drop=[(scene.waiting, "late"), (scene.waiting, "later")]))
    assert step.dropped == [(scene.waiting, "late")]
    assert step.refused == [(scene.waiting, "planned twice")]
    assert scene.desk.ended.count(scene.waiting) == 1


@pytest.mark.parametrize("name", ["decode", "prefill", "paused", "waiting"])
def test_a_dropped_request_ends_at_once_in_whatever_state_it_is_and_computes_nothing_more(name: str) -> None:
    scene = make_scene()
    request: Request = getattr(scene, name)
    computed = request.num_computed_tokens
    step = scene.desk.plan(Plan(decode_all=True, drop=[(request, "too late")]))
    assert step.dropped == [(request, "too late")]
    assert request.state is State.DROPPED
    assert request.num_computed_tokens == computed
    assert request.num_blocks == 0
    assert step.num_decodes == (name != "decode")
    assert request not in scene.desk.scheduler.queue
    row = next(row for row in scene.desk.log.requests if row[0] == request.id)
    assert "dropped" in row
    assert "too late" in row


def test_a_dropped_member_of_the_decode_group_is_named_as_having_left_it() -> None:
    scene = make_scene()
    scene.desk.run(Plan(decode_all=True))
    step = scene.desk.plan(Plan(decode_all=True, chunks=[(scene.prefill, 4)], drop=[(scene.decode, "late")]))
    assert step.left == [scene.decode]
    assert (step.num_decodes, step.decode_all) == (0, False)
    assert step.shape.num_tokens == 4


def test_a_decode_all_with_nobody_to_decode_does_not_count_as_a_step_of_the_group() -> None:
    desk = Desk(LIMITS)
    request = desk.submit(8)
    step = desk.run(Plan(decode_all=True, chunks=[(request, 4)]))
    assert (step.decode_all, step.num_decodes, step.decode_clock) == (False, 0, 0)


# Budgets


def test_chunks_beyond_the_slots_are_refused_and_wait_again() -> None:
    desk = Desk(LIMITS)
    requests = [desk.submit(4) for _ in range(6)]
    step = desk.plan(Plan(chunks=[(r, 4) for r in requests]))
    assert step.admitted == requests[:4]
    assert step.refused == [(r, "slots") for r in requests[4:]]
    assert desk.scheduler.queue == requests[4:]


def test_a_chunk_that_memory_cannot_hold_is_refused_and_a_smaller_one_behind_it_runs() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 20, prefix_caching=False))
    first, big, small = desk.submit(9), desk.submit(12), desk.submit(8)
    step = desk.plan(Plan(chunks=[(first, 9), (big, 12), (small, 8)]))
    assert step.refused == [(big, "no blocks")]
    assert step.admitted == [first, small]
    assert desk.scheduler.queue == [big]
    assert big.num_blocks == 0


def test_blocks_held_ahead_count_as_needed() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 20, prefix_caching=False))
    first, second = desk.submit(8), desk.submit(4)
    step = desk.plan(Plan(chunks=[(first, 4), (second, 4)], hold={first.id: 20}))
    assert first.num_blocks == 5
    assert step.refused == [(second, "no blocks")]


def test_a_refused_admission_gives_its_prefix_hit_back() -> None:
    desk = Desk(Limits(6, 4, 4, 32, 24))
    keys = tuple(block_keys([1] * 16, 4))
    first = desk.submit(16, keys=keys)
    desk.run(Plan(chunks=[(first, 16)]), first)
    second = desk.submit(16, keys=keys)
    step = desk.plan(Plan(chunks=[(second, 9)]))
    assert step.refused == [(second, "9 tokens asked for, 4 left")]
    assert desk.plane.num_free_blocks == 6
    assert desk.plane.match(keys) == 4


def test_single_decodes_are_refused_one_by_one_where_tokens_or_blocks_end() -> None:
    desk = Desk(Limits(5, 4, 4, 3, 20, prefix_caching=False))
    requests = [desk.submit(3) for _ in range(4)]
    for request in requests:
        desk.run(Plan(chunks=[(request, 3)]))
    step = desk.run(Plan(decodes=requests))
    assert step.refused == [(requests[3], "token budget")]
    assert step.decodes == requests[:3]
    # The first three now need a second block each, and there is one.
    step = desk.run(Plan(decodes=requests[:3]))
    assert step.refused == [(requests[1], "no blocks"), (requests[2], "no blocks")]
    assert [r.num_output_tokens for r in requests] == [3, 2, 2, 1]


def test_decode_all_beyond_the_token_budget_runs_nobody() -> None:
    desk = Desk(Limits(8, 4, 4, 3, 20, prefix_caching=False))
    requests = [desk.submit(3) for _ in range(4)]
    for request in requests:
        desk.run(Plan(chunks=[(request, 3)]))
    step = desk.plan(Plan(decode_all=True))
    assert step.refused == [(r, "token budget") for r in requests]
    assert not step.runs


def test_decode_all_leaves_out_whoever_gets_no_block_and_takes_it_back_later() -> None:
    desk = Desk(Limits(4, 4, 4, 16, 16, prefix_caching=False))
    first, second, third = (desk.submit(n) for n in (3, 4, 4))
    desk.run(Plan(chunks=[(first, 3), (second, 4), (third, 4)]))
    step = desk.run(Plan(decode_all=True))
    assert step.refused == [(third, "no blocks")]
    assert step.num_decodes == 2
    assert [r.num_output_tokens for r in (first, second, third)] == [2, 2, 1]
    step = desk.run(Plan(decode_all=True, preempt=[(second, Mode.RECOMPUTE)]))
    assert step.num_decodes == 2 or step.refused  # one block became free, and two want one
    assert first.num_output_tokens + third.num_output_tokens == 3 + step.num_decodes


def test_a_request_that_does_not_decode_is_refused_among_the_decodes() -> None:
    scene = make_scene()
    step = scene.desk.plan(Plan(decodes=[scene.prefill, scene.waiting, scene.paused, scene.decode]))
    assert step.refused == [(r, "not a decode") for r in (scene.prefill, scene.waiting, scene.paused)]
    assert step.decodes == [scene.decode]


# Bundles


def bundle(*requests: Request) -> frozenset[int]:
    return frozenset(r.id for r in requests)


def test_a_bundle_that_fits_runs_whole() -> None:
    desk = Desk(LIMITS)
    a, b, c = desk.submit(8), desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, 8), (c, 8)], bundles=[bundle(a, c)]))
    assert step.admitted == [a, b, c]


@pytest.mark.parametrize("limit", ["slots", "blocks", "tokens"])
def test_a_bundle_that_does_not_fit_beside_the_rest_of_the_plan_does_not_run_in_part(limit: str) -> None:
    limits = {
        "slots": Limits(20, 4, 2, 32, 80, prefix_caching=False),
        "blocks": Limits(5, 4, 4, 32, 20, prefix_caching=False),
        "tokens": Limits(20, 4, 4, 20, 80, prefix_caching=False),
    }[limit]
    desk = Desk(limits)
    a, b, c = desk.submit(8), desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, 8), (c, 8)], bundles=[bundle(a, c)]))
    assert step.refused == [(a, "its bundle does not fit"), (c, "its bundle does not fit")]
    assert step.admitted == [b]
    assert desk.scheduler.queue == [a, c]


def test_a_bundle_counts_the_tokens_and_blocks_that_the_decodes_of_its_step_take() -> None:
    for limits in (Limits(20, 4, 4, 16, 80, prefix_caching=False), Limits(5, 4, 4, 32, 20, prefix_caching=False)):
        desk = Desk(limits)
        running = desk.submit(4)
        desk.run(Plan(chunks=[(running, 4)]))
        a, b = desk.submit(8), desk.submit(8)
        step = desk.plan(Plan(decode_all=True, chunks=[(a, 8), (b, 8)], bundles=[bundle(a, b)]))
        assert step.refused == [(a, "its bundle does not fit"), (b, "its bundle does not fit")]
        assert step.num_decodes == 1
        assert step.admitted == []


def test_a_bundle_with_a_member_that_cannot_run_does_not_run_in_part() -> None:
    scene = make_scene()
    plan = Plan(chunks=[(scene.waiting, 4), (scene.prefill, 99)], bundles=[bundle(scene.waiting, scene.prefill)])
    step = scene.desk.plan(plan)
    assert step.refused == [(r, "its bundle does not fit") for r in (scene.waiting, scene.prefill)]
    assert not step.runs


@pytest.mark.parametrize("tokens", [2.5, "3"])
def test_a_bundle_with_a_member_of_half_a_token_does_not_run_in_part(tokens: Any) -> None:
    desk = Desk(LIMITS)
    a, b = desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, tokens)], bundles=[bundle(a, b)]))
    assert step.refused == [
        (b, f"{tokens!r} tokens, 0 to hold: not whole numbers"),
        (a, "its bundle does not fit"),
    ]
    assert not step.runs


def test_a_bundle_counts_the_idle_blocks_that_its_prefix_hits_take() -> None:
    desk = Desk(Limits(6, 4, 4, 32, 24))
    keys = tuple(block_keys([1] * 16, 4))
    first = desk.submit(16, keys=keys)
    desk.run(Plan(chunks=[(first, 16)]), first)
    # Four blocks idle, two free: `hit` takes three idle ones and one more, so only two are left for `other`.
    hit, other = desk.submit(16, keys=keys[:3]), desk.submit(12)
    step = desk.plan(Plan(chunks=[(hit, 4), (other, 12)], bundles=[bundle(hit, other)]))
    assert [reason for _, reason in step.refused] == ["its bundle does not fit"] * 2
    assert not step.runs


# Pausing


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


# Steps in flight


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


# Pins


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


# Policies that do not do their work


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


# Submission


@pytest.mark.parametrize(
    ("prompt", "cap", "why"),
    [
        (0, 5, "the prompt is empty"),
        (4, 0, "max_tokens must be at least 1, not 0"),
        (80, 5, "the prompt has 80 tokens; the model's limit of 80 leaves room for a prompt of 79"),
        (200, 5, "the prompt has 200 tokens"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_both_numbers(prompt: int, cap: int, why: str) -> None:
    desk = Desk(LIMITS)
    with pytest.raises(RequestRefused, match=why):
        desk.submit(prompt, cap)
    assert desk.plane.num_live == 0
    assert [r.state for r in desk.ended] == [State.REFUSED]
    (row,) = desk.log.requests
    named = dict(zip(REQUESTS, row, strict=True))
    assert named["status"] == "refused"
    assert re.search(why, str(named["error"]))


def test_a_request_that_memory_can_never_hold_is_refused_with_both_numbers() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 80, prefix_caching=False))
    with pytest.raises(RequestRefused, match="need 6 KV blocks of 4 tokens; this replica has 5"):
        desk.submit(14, 7)
    assert desk.submit(14, 6).state is State.WAITING


def test_the_cap_is_cut_to_what_the_models_limit_leaves() -> None:
    assert Desk(LIMITS).submit(70, 50).max_tokens == 10


def test_a_second_request_with_the_id_of_a_live_one_is_refused_and_leaves_the_first_ones_record_alone() -> None:
    desk = Desk(LIMITS)
    first = desk.submit(8)
    desk.run(Plan(chunks=[(first, 8)]))
    with pytest.raises(RequestRefused, match="request id 0 is in use"):
        desk.plane.submit(Request(0, desk.now, 4, 4), desk.now)
    desk.run(Plan(decode_all=True), first)
    refused, served = desk.log.requests
    assert (refused[0], refused[3], served[0], served[3]) == (0, 1, 0, 0)  # column 3: before_step
