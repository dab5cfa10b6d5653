"""The benchmark of planning measures what it says: every kind of step, and a reference that decides alike."""

from __future__ import annotations

import pytest

from benchmarks.plan_time import KINDS, NAIVE, Kind, Load, measure, stacks
from policies import registry

REST = ("full_prompt", "last_admitted", "lru")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scheduler", ["mixed", NAIVE])
def test_every_kind_of_step_is_found_and_timed(scheduler: str, kind: Kind) -> None:
    row = measure(kind, (scheduler, "sjf", *REST), waiting=40, samples=3)
    assert row is not None
    assert row.steps == 3
    assert 0 < row.scheduler_us_median < row.plan_us_median <= row.plan_us_p99
    assert (row.admitted_mean > 0) is (kind.name in ("admit", "cached"))
    assert (row.preempted_mean > 0) is (kind.name == "preempt")


def test_a_scheduler_without_such_steps_has_no_times() -> None:
    preempt = next(kind for kind in KINDS if kind.name == "preempt")
    assert measure(preempt, ("mixed", "fcfs", "reserve_max", "last_admitted", "lru"), waiting=10, samples=2) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_naive_reference_decides_as_mixed_does(kind: Kind) -> None:
    fast, slow = (Load(kind, (scheduler, "priority", *REST), 60) for scheduler in ("mixed", NAIVE))
    for _ in range(40):
        a, b = fast.step()[0], slow.step()[0]
        assert [r.id for r in a.admitted] == [r.id for r in b.admitted]
        assert [r.id for r, _ in a.preempted] == [r.id for r, _ in b.preempted]
        assert a.shape == b.shape


def test_every_registered_policy_that_plans_is_among_those_that_are_timed() -> None:
    timed = stacks()
    for place, role in enumerate(("scheduler", "queue", "admission", "preemption", "eviction")):
        assert set(registry.names(role)) - {"belady"} <= {names[place] for names in timed}
