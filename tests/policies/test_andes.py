"""Quality of experience, and the scheduler that goes by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.plan import Mode
from policies.qoe import expected_area, qoe, read_on, shown_ns
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Slo
from policies.schedulers.andes import Andes, knapsack
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run
from tests.policies.harness import STEP_NS, Drive, Job
from tests.policies.test_library import jobs

# QoE


def test_what_comes_no_later_than_expected_is_perfect_however_early() -> None:
    on_time = [100, 200, 300, 400]
    assert shown_ns(on_time, 100, 100) == on_time
    for delivered in (on_time, [0, 0, 0, 0], [90, 110, 290, 400], [0, 0, 0, 400]):
        assert shown_ns(delivered, 100, 100) == on_time
        assert qoe(delivered, 100, 100) == 1.0


def test_a_late_start_costs_every_token_its_delay() -> None:
    """9 tokens, 1000 late: they are shown for 100 * (1 + ... + 9) = 4500, and should have been for 9 * 1000 more."""
    late = [2000 + 100 * k for k in range(9)]
    assert qoe(late, 1000, 100) == pytest.approx(4500 / (4500 + 9 * 1000))
    assert qoe([2000] * 9, 1000, 100) == qoe(late, 1000, 100), "all at once is no better: the user reads as fast"


def test_a_stall_is_worked_by_hand() -> None:
    """Shown at 100, 200, 600, 700; read at 800: 700 + 600 + 200 + 100 of 700 + 600 + 500 + 400."""
    assert qoe([100, 200, 600, 700], 100, 100) == pytest.approx(1600 / 2200)
    assert qoe([0, 0, 0, 450], 100, 100) == pytest.approx(1150 / 1200), "the buffer covers all but 50 of it"
    assert qoe([100, 200, 450, 460], 100, 100) == pytest.approx((550 + 450 + 200 + 100) / (550 + 450 + 350 + 250))
    assert shown_ns([100, 200, 450, 460], 100, 100) == [100, 200, 450, 550]


def test_an_answer_that_has_not_come_is_worth_nothing_once_it_is_expected() -> None:
    assert qoe([], 100, 100, until_ns=100, num_tokens=5) == 1.0
    assert qoe([], 100, 100, until_ns=101, num_tokens=5) == 0.0
    assert qoe([100], 100, 100, until_ns=300, num_tokens=5) == pytest.approx(200 / (200 + 100))
    assert qoe([], 100, 100) == 1.0


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.integers(0, 300), st.integers(1, 50), st.data())
def test_qoe_lies_between_0_and_1_and_no_earlier_delivery_is_worse(
    gaps: list[int], ttft: int, tpot: int, data: st.DataObject
) -> None:
    delivered = np.cumsum(gaps).tolist()
    earlier = sorted(max(0, at - data.draw(st.integers(0, 200))) for at in delivered)
    until = 20_000
    late, early = qoe(delivered, ttft, tpot, until), qoe(earlier, ttft, tpot, until)
    assert 0 <= late <= early <= 1
    in_time = all(at <= ttft + k * tpot for k, at in enumerate(delivered))
    assert (qoe(delivered, ttft, tpot) == 1) is in_time


CURVE = st.tuples(*[st.floats(0, 8)] * 2, st.floats(0.1, 2), *[st.floats(0, 9)] * 2, st.floats(0, 3), st.floats(0, 12))


@settings(max_examples=150, deadline=None)
@given(CURVE)
def test_the_smooth_curve_is_what_many_small_steps_give(drawn: tuple[float, ...]) -> None:
    shown, more, pace, lead, wait, rate, span = drawn
    count, area, x, n = 6_000, 0.0, shown if lead == 0 else 0.0, shown + more
    drawn = (x, n, *drawn[2:])
    dt = span / count
    for k in range(count):
        t = (k + 0.5) * dt
        n += rate * dt * (t > wait)
        if t > lead:
            x = min(x + pace * dt, n)
        area += x * dt
    got, end = read_on(*(np.array([value]) for value in drawn))
    assert got[0] == pytest.approx(area, abs=0.03)
    assert end[0] == pytest.approx(x, abs=0.02)


def test_the_smooth_curve_agrees_with_whole_tokens_on_a_long_answer() -> None:
    """1000 tokens, one every 10, the first 2000 late."""
    zero, one = np.zeros(1), np.ones(1)
    actual, shown = read_on(zero, zero, one / 10, zero, one * 2000, one / 10, one * 12_000)
    exact = qoe([2000 + 10 * k for k in range(1000)], 0, 10, until_ns=12_000, num_tokens=1200)
    assert shown[0] == pytest.approx(1000)
    assert (actual / expected_area(one / 10, one * 12_000))[0] == pytest.approx(exact, abs=0.002)


# The scheduler

FAST = "andes,horizon_ms=0.05,ttft_ms=0.005,tokens_per_s=300000"
"""Suits steps of 1000 ns: the first token after 5 steps, one every 3.3 steps, 50 steps ahead."""
AMPLE = Limits(4096, 4, 64, 256, 4096, prefix_caching=False)


@settings(max_examples=40, deadline=None)
@given(jobs(), st.sampled_from([0, 1]), st.booleans(), st.sampled_from(["fcfs", "priority", "edf"]))
def test_with_memory_slots_and_time_in_plenty_it_decides_exactly_as_mixed(
    work: list[Job], lag: int, caching: bool, queue: str
) -> None:
    calm = [dataclasses.replace(job, slo=Slo(ttft_ns=50 * STEP_NS, tpot_ns=10**9)) for job in work]
    limits = Limits(4096, 4, 64, 32, 110, prefix_caching=caching, lag=lag)
    assert_same_run(limits, calm, StackSpec("andes", queue), StackSpec("mixed", queue))


def test_a_user_with_a_full_buffer_makes_way_for_one_who_waits_and_comes_back_in_time() -> None:
    """One slot, steps of 1000 ns. The first answer comes ten times as fast as it is read."""
    limits = Limits(400, 4, 1, 64, 400, prefix_caching=False)
    slow = Slo(ttft_ns=5 * STEP_NS, tpot_ns=10 * STEP_NS)
    work = [Job(8, 40, slo=slow), Job(8, 4, arrives=12, slo=Slo(ttft_ns=10 * STEP_NS, tpot_ns=10 * STEP_NS))]
    drive = Drive(limits, StackSpec("andes,horizon_ms=0.05"), work)
    first, second = drive.requests
    assert [(r.id, mode) for step in drive.steps for r, mode in step.preempted] == [(0, Mode.KEEP)]
    assert second.first_token_ns is not None
    assert second.first_token_ns - second.arrival_ns <= 10 * STEP_NS, "in time"
    assert first.finish_ns == 44 * STEP_NS, "its last token was expected at step 5 + 39 * 10"
    plain = Drive(limits, StackSpec("mixed"), work).requests[1]
    assert plain.first_token_ns is not None
    assert plain.first_token_ns - plain.arrival_ns > 10 * STEP_NS


@settings(max_examples=40, deadline=None)
@given(jobs(), st.sampled_from([28, 40]), st.sampled_from([0, 1]), st.integers(0, 2))
def test_nobody_is_paused_more_often_than_the_cap_and_nothing_is_kept_of_who_has_ended(
    work: list[Job], blocks: int, lag: int, cap: int
) -> None:
    work = [dataclasses.replace(job, slo=None) for job in work]
    drive = Drive(Limits(blocks, 4, 3, 32, 110, lag=lag), StackSpec(f"{FAST},cap={cap}"), work)
    paused = [r.id for step in drive.steps for r, mode in step.preempted if mode is Mode.KEEP]
    assert all(paused.count(i) <= cap for i in paused)
    scheduler = drive.stack.scheduler
    assert isinstance(scheduler, Andes)
    assert not scheduler._readers
    assert not scheduler._pool


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 14), st.integers(0, 60))
def test_the_knapsack_takes_each_in_turn_that_fits(blocks: list[int], size: int, memory: int) -> None:
    taken: list[int] = []
    for i, count in enumerate(blocks):
        if len(taken) < size and sum(blocks[k] for k in taken) + count <= memory:
            taken.append(i)
    assert np.flatnonzero(knapsack(np.array(blocks, int), size, memory)).tolist() == taken


def test_knobs_out_of_range_are_refused() -> None:
    for knob in ("horizon_ms=0", "cap=-1", "memory=2", "pool=0", "sizes=0", "tokens_per_s=0", "ttft_ms=-1"):
        with pytest.raises(PolicyError, match="must be"):
            StackSpec(f"andes,{knob}").build()
    assert StackSpec("andes").build().needs_cost() == "Andes"
