"""A plan that cannot be carried out: the control plane refuses the item, says why, and touches nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies.plan import FOREVER, Mode, Plan, Step
from policies.prefix import block_keys
from policies.replica_state import Limits
from policies.request import Request, State
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS, Scene, books, make_scene


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


def test_a_request_is_not_dropped_and_preempted_in_one_plan() -> None:
    scene = make_scene()
    step = scene.desk.plan(Plan(drop=[(scene.prefill, "late")], preempt=[(scene.prefill, Mode.RECOMPUTE)]))
    assert (step.dropped, step.preempted) == ([(scene.prefill, "late")], [])
    assert [request for request, _ in step.refused] == [scene.prefill]
    assert scene.prefill.state is State.DROPPED


def test_a_request_that_is_named_twice_among_the_decodes_decodes_once() -> None:
    scene = make_scene()
    step = scene.desk.run(Plan(decodes=[scene.decode, scene.decode]))
    assert step.decodes == [scene.decode]
    assert step.refused == [(scene.decode, "planned twice")]
    assert scene.decode.num_output_tokens == 2


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
