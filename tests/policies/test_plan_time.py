"""The benchmark of planning measures what it says: every kind of step, and a reference that decides alike."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.plan_rows import GROWS, MOVES, NAIVE, OWN, Row, cause, explain, with_growth
from benchmarks.plan_time import KINDS, Kind, Load, measure, stacks
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


def row(waiting: int, median: float, admitted: float = 0.0, preempted: float = 0.0, scheduler: str = "mixed") -> Row:
    return Row(scheduler, "sjf", *REST, "preempt", waiting, 100, median, median, median, median, admitted, preempted)


@pytest.mark.parametrize(
    ("few", "many", "why"),
    [
        (row(1_000, 1001, 0, 2), row(100_000, 9000, 0, 2), OWN),
        (row(1_000, 500, 8, 2), row(100_000, 1300, 10, 10), MOVES),
        (row(1_000, 500, 8, 2), row(100_000, 1301, 10, 10), GROWS),
        (row(1_000, 900, 8, 2), row(100_000, 1001, 8, 2), GROWS),
        (row(1_000, 900), row(100_000, 1001), GROWS),
        (None, row(100_000, 1001, 1), GROWS),
    ],
)
def test_what_is_over_the_target_is_told_by_the_same_case_with_few_waiting(
    few: Row | None, many: Row, why: str
) -> None:
    assert cause(few, many) == why


def test_growth_is_in_terms_of_the_same_stack_and_kind_of_step_with_the_fewest_waiting() -> None:
    rows = [row(1_000, 400), row(10_000, 500), row(100_000, 1100), row(100_000, 900, scheduler="every")]
    grown = with_growth(rows)
    assert [r.growth for r in grown] == [1.0, 1.25, 2.75, None]
    said = io.StringIO()
    explain(grown, Console(file=said, width=200))
    assert "1 of 2 within 1,000 microseconds with 100,000 waiting; the slowest is mixed, sjf" in said.getvalue()
    assert "  mixed + sjf + full_prompt + last_admitted, preempt: 1,100 with 0.0 moved, 400 with 0.0" in said.getvalue()
