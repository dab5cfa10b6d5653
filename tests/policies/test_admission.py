"""When a waiting request may start."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.plan import Mode, Plan
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import State
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.harness import Drive, Job

LIMITS = Limits(10, 4, 4, 8, 40, prefix_caching=False)


def admitted(admission: str, running: int, prompt: int, cap: int = 4) -> bool:
    """Whether a request gets in beside one that runs with so many tokens of ten blocks of four."""
    desk = Desk(Limits(10, 4, 4, 40, 40, prefix_caching=False))
    desk.plane.stack.admission = make("admission", admission, block_size=4)
    first = desk.submit(running, cap=1 if running == 40 else 4)
    desk.run(Plan(chunks=[(first, running)]))
    second = desk.submit(prompt, cap)
    draft = desk.plane.view.draft()
    draft.tokens_left = 8
    return draft.admit(second)


@pytest.mark.parametrize(
    ("admission", "running", "prompt", "fits"),
    [
        ("full_prompt", 20, 20, True),
        ("full_prompt", 20, 21, False),  # its first chunk of 8 would fit, all of it does not
        ("watermark,watermark=0", 20, 36, True),  # only the first chunk counts
        ("watermark,watermark=0.3", 20, 36, True),  # two blocks of five, three stay free
        ("watermark,watermark=0.3", 24, 36, False),
        ("watermark,watermark=0.31", 20, 36, False),
        ("reserve_max", 12, 20, True),  # (12 + 4) / 4 + (20 + 4) / 4 = 10 blocks
        ("reserve_max", 12, 21, False),
        ("reserve_max", 13, 20, False),
    ],
)
def test_a_rule_lets_in_as_much_as_it_says(admission: str, running: int, prompt: int, fits: bool) -> None:
    assert admitted(admission, running, prompt) is fits


@pytest.mark.parametrize("admission", ["full_prompt", "watermark,watermark=0.9", "reserve_max"])
def test_a_request_alone_on_a_replica_is_always_let_in(admission: str) -> None:
    desk = Desk(LIMITS)
    desk.plane.stack.admission = make("admission", admission, block_size=4)
    assert desk.view_admits(desk.submit(36, 4))


def test_what_a_request_promised_is_free_again_when_it_ends_or_is_preempted() -> None:
    desk = Desk(LIMITS)
    rule = desk.plane.stack.admission = make("admission", "reserve_max", block_size=4)
    first, second = desk.submit(8, 12), desk.submit(8, 12)
    desk.run(Plan(chunks=[(first, 4), (second, 4)]))
    assert rule._total == 10
    desk.run(Plan(chunks=[(second, 4)], preempt=[(first, Mode.RECOMPUTE)]))
    assert rule._total == 5
    desk.run(Plan(decode_all=True), second)
    assert rule._total == 0


def test_a_paused_request_keeps_its_promise_and_is_not_asked_for_it_again() -> None:
    desk = Desk(LIMITS)
    rule = desk.plane.stack.admission = make("admission", "reserve_max", block_size=4)
    first, second = desk.submit(4, 16), desk.submit(4, 16)
    desk.run(Plan(chunks=[(first, 4), (second, 4)]))
    desk.run(Plan(decode_all=True, preempt=[(first, Mode.KEEP)]))
    assert rule._total == 10
    assert desk.view_admits(first)


def test_several_admissions_of_one_step_count_each_other() -> None:
    desk = Desk(Limits(10, 4, 4, 20, 40, prefix_caching=False))
    desk.plane.stack.admission = make("admission", "reserve_max", block_size=4)
    requests = [desk.submit(4, 8) for _ in range(4)]
    draft = desk.plane.view.draft()
    assert [draft.admit(r) for r in requests] == [True, True, True, False]
    assert draft.plan.blocked == [(requests[3], "admission")]


@pytest.mark.parametrize("watermark", ["1", "-0.1", "nan", "inf"])
def test_a_watermark_outside_its_range_is_refused(watermark: str) -> None:
    with pytest.raises(PolicyError, match="watermark"):
        make("admission", f"watermark,watermark={watermark}")


JOBS = st.lists(st.builds(Job, st.integers(1, 40), st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    JOBS,
    st.sampled_from(["mixed", "mixed,long_prefill_threshold=5", "prefill_first", "sarathi,chunk_size=12", "static"]),
    st.integers(18, 40),
    st.sampled_from([0, 1]),
)
def test_reserving_the_most_that_each_can_need_never_preempts(
    work: list[Job], scheduler: str, num_blocks: int, lag: int
) -> None:
    """Oracle H1 for the reservation: whoever is let in can run to its cap."""
    limits = Limits(num_blocks, 4, 6, 32, 72, prefix_caching=False, lag=lag)
    drive = Drive(limits, StackSpec(scheduler, admission="reserve_max"), work)
    assert all(request.num_preemptions == 0 for request in drive.requests)
    assert all(request.state is State.LENGTH for request in drive.requests)
