"""Tiers under overload: who is turned away, and who is not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.queues.tier_shed import OVERLOAD
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Slo
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import Drive, Job
from tests.policies.test_library import jobs

ALONE = Limits(400, 4, 1, 64, 100, prefix_caching=False)
DROPPABLE = Slo(ttft_ns=1, droppable=True)


def low(arrives: int = 1, slo: Slo | None = DROPPABLE, priority: int = 1) -> Job:
    return Job(4, 6, arrives, priority=priority, slo=slo)


def fates(queue: str, *work: Job) -> list[str]:
    drive = Drive(ALONE, StackSpec(queue=queue), [Job(4, 6), *work])
    assert {why for step in drive.steps for _, why in step.dropped} <= {OVERLOAD}
    return [drive.status(i) for i in range(1, 1 + len(work))]


def test_beyond_the_limit_the_last_newcomers_of_low_tiers_are_dropped() -> None:
    assert fates("tier_shed,max_waiting=2", low(), low(), low(), low()) == ["length"] * 2 + ["dropped"] * 2
    assert fates("tier_shed,max_waiting=4", low(), low(), low(), low()) == ["length"] * 4
    assert fates("tier_shed,max_waiting=2,tier=1", low(), low(), low(priority=2)) == ["length", "length", "dropped"]


def test_high_tiers_and_those_that_must_not_be_dropped_stay_and_count() -> None:
    high = low(priority=0)
    assert fates("tier_shed,max_waiting=2", high, high, high, low()) == ["length"] * 3 + ["dropped"]
    assert fates("tier_shed,max_waiting=1", low(slo=None), low(slo=Slo(ttft_ns=1)), low()) == ["length"] * 2 + [
        "dropped"
    ]


def test_who_has_waited_through_a_step_stays() -> None:
    assert fates("tier_shed,max_waiting=1", low(1), low(2, priority=0), low(3)) == ["length", "length", "dropped"]


@settings(max_examples=30, deadline=None)
@given(jobs(), st.sampled_from([28, 400]), st.sampled_from([0, 1]))
def test_below_the_limit_it_decides_exactly_as_fcfs(work: list[Job], blocks: int, lag: int) -> None:
    limits = Limits(blocks, 4, 6, 32, 110, lag=lag)
    assert_same_run(limits, work, StackSpec(queue="tier_shed,max_waiting=12"), StackSpec(queue="fcfs"))


def test_in_little_memory_nobody_is_dropped_who_has_run() -> None:
    work = [dataclasses.replace(low(i), prompt=20, output=40) for i in range(6)]
    drive = Drive(Limits(24, 4, 6, 32, 110, prefix_caching=False), StackSpec(queue="tier_shed,max_waiting=1"), work)
    assert sum(len(d.preempted) for d in decisions(drive)) > 0
    assert "dropped" in {drive.status(i) for i in range(6)}
    for i, request in enumerate(drive.requests):
        assert (drive.status(i) == "dropped") is (request.first_scheduled_ns is None)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(PolicyError, match="0 or more"):
        make("queue", "tier_shed,max_waiting=-1")
