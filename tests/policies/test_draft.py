"""A draft counts as the control plane does: what it promises is enacted, and it refuses no less than it must."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import View
from policies.plan import Mode, Plan
from policies.prefix import block_keys
from policies.replica_state import Limits
from policies.request import State
from tests.policies.byhand import Desk, drawn


def test_a_block_of_a_victim_that_an_admission_hits_is_not_promised_twice() -> None:
    desk = Desk(Limits(6, 4, 4, 32, 24))
    keys = tuple(block_keys([1] * 16, 4))
    victim = desk.submit(17, keys=keys)
    desk.run(Plan(chunks=[(victim, 17)]))
    same, other = desk.submit(17, keys=keys), desk.submit(8)

    def plan(view: View, now: int) -> Plan:
        draft = view.draft()
        draft.preempt(victim, Mode.RECOMPUTE)
        assert draft.blocks_left == 6
        assert draft.admit(same)  # four blocks of the victim's, one more
        assert draft.blocks_left == 1
        assert not draft.admit(other)
        return draft.finish()

    desk.scheduler.answer = plan
    step = desk.plane.plan(desk.now)
    assert step.refused == []
    assert same.num_cached_tokens == 16


def test_a_block_that_an_admission_hits_is_not_freed_by_preempting_its_holder() -> None:
    desk = Desk(Limits(6, 4, 4, 32, 24))
    keys = tuple(block_keys([1] * 16, 4))
    victim = desk.submit(17, keys=keys)
    desk.run(Plan(chunks=[(victim, 17)]))
    same = desk.submit(17, keys=keys)

    def plan(view: View, now: int) -> Plan:
        draft = view.draft()
        assert draft.admit(same)
        assert draft.blocks_left == 0
        draft.preempt(victim, Mode.RECOMPUTE)
        assert draft.blocks_left == 1
        return draft.finish()

    desk.scheduler.answer = plan
    assert desk.plane.plan(desk.now).refused == []
    assert desk.plane.num_free_blocks == 1


def test_a_preempted_request_with_nothing_left_to_compute_is_no_decode_that_went_away() -> None:
    desk = Desk(Limits(20, 4, 8, 4, 40, prefix_caching=False, lag=1))
    decodes = [desk.submit(2) for _ in range(3)]
    for request in decodes:
        desk.run(Plan(chunks=[(request, 2)]))
    last = desk.submit(2, cap=1)
    desk.plan(Plan(chunks=[(last, 2)]))

    def plan(view: View, now: int) -> Plan:
        draft = view.draft()
        draft.preempt(last, Mode.RECOMPUTE)
        for request in decodes[:2]:
            draft.run(request, 1)
        return draft.finish()

    desk.scheduler.answer = plan
    step = desk.plane.plan(desk.now)
    assert step.decodes == decodes[:2]
    assert decodes[2].num_output_tokens == 1


def test_who_was_preempted_waits_until_the_step_that_still_computes_for_it_is_in() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False, lag=1))
    request = desk.submit(6)
    first = desk.plan(Plan(chunks=[(request, 6)]))
    other = desk.submit(4)
    desk.plan(Plan(preempt=[(request, Mode.RECOMPUTE)], chunks=[(other, 4)]))
    draft = desk.plane.view.draft()
    assert not draft.admit(request)
    assert draft.plan.blocked == [(request, "in flight")]
    desk.report(first)
    assert desk.view_admits(request)


def test_what_a_plan_had_given_a_victim_goes_back_to_its_budgets() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False))
    decode, prefill = desk.submit(4), desk.submit(28)
    desk.run(Plan(chunks=[(decode, 4), (prefill, 8)]))
    draft = desk.plane.view.draft()
    draft.run(decode, 1)
    draft.run(prefill, 20)
    assert (draft.tokens_left, draft.blocks_left, draft.seqs_left) == (11, 17 - 1 - 5, 2)
    draft.preempt(prefill, Mode.RECOMPUTE)
    assert (draft.tokens_left, draft.blocks_left, draft.seqs_left) == (31, 17 - 1 + 2, 3)
    draft.preempt(decode, Mode.KEEP)
    assert (draft.tokens_left, draft.blocks_left, draft.seqs_left) == (32, 17 + 2, 4)
    assert (draft.plan.chunks, draft.plan.decodes, draft.num_tokens) == ([], [], 0)


@pytest.mark.parametrize(
    ("spent", "reason"),
    [("seqs_left", "slots"), ("tokens_left", "token budget"), ("blocks_left", "no blocks")],
)
def test_a_request_passed_over_is_on_record_with_the_reason(spent: str, reason: str) -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False))
    request = desk.submit(6)
    draft = desk.plane.view.draft()
    setattr(draft, spent, 0)
    assert not draft.admit(request)
    assert draft.plan.blocked == [(request, reason)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_is_drafted_is_enacted(data: st.DataObject) -> None:
    """Preempt, pause, resume, run and admit at random, with shared prefixes, in one draft a step: no refusals."""
    desk = Desk(Limits(data.draw(st.integers(8, 14), label="blocks"), 4, 4, 24, 32))
    requests = drawn(data, desk)

    def plan(view: View, now: int) -> Plan:
        draft = view.draft()
        if data.draw(st.booleans(), label="everyone"):
            draft.run_everyone(data.draw(st.sampled_from([None, 3])))
        for request in requests:
            if draft.plan.decode_all or draft.plan.chunks or request.state is not State.RUNNING:
                continue
            move = data.draw(st.sampled_from(["run", "recompute", "keep", "idle"]), label=f"{request}")
            if move in ("recompute", "keep"):
                draft.preempt(request, Mode.RECOMPUTE if move == "recompute" else Mode.KEEP)
            elif move == "run" and request.num_output_tokens < request.max_tokens and draft.tokens_left:
                tokens = min(request.num_pending_tokens, draft.tokens_left)
                if draft.blocks_needed(request, tokens) <= draft.blocks_left:
                    draft.run(request, tokens)
        for request in list(desk.scheduler.queue):
            if data.draw(st.booleans(), label=f"admit {request}"):
                draft.admit(request, max_chunk=data.draw(st.sampled_from([None, 5])))
        return draft.finish()

    desk.scheduler.answer = plan
    for _ in range(10):
        step = desk.plane.plan(desk.now)
        assert step.refused == []
        sampled = {c.request for c in step.chunks if c.samples} | {*step.decodes, *step.capped}
        desk.plane._empty_plans = 0  # idling is allowed here
        if step.runs:
            desk.report(step, *sorted((r for r in sampled if r.num_output_tokens == r.max_tokens), key=lambda r: r.id))


def test_a_copy_of_a_plan_says_the_same_and_shares_no_list_with_it() -> None:
    plan = Plan()
    for i, each in enumerate(fields(Plan)):
        if isinstance(getattr(plan, each.name), list):
            getattr(plan, each.name).append(i)
        elif isinstance(getattr(plan, each.name), dict):
            getattr(plan, each.name)[i] = i
        else:
            setattr(plan, each.name, i + 1)
    other = plan.copy()
    assert other == plan
    assert not [
        f.name for f in fields(Plan) if (v := getattr(plan, f.name)) is getattr(other, f.name) and v.__hash__ is None
    ]
