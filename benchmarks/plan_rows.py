"""What `benchmarks.plan_time` has measured: a table for each kind of step, and what is over the target, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

WAITING = (1_000, 10_000, 100_000)
TARGET_US = 1_000.0
NAIVE = "sort every step"
WHY = {
    "preemptive": "each who is stopped with the one who starts in its place costs some 30 us in the policy and as much "
    "in carrying it out, and the running are put in order, however many wait",
    "predicted_peak": "the output of all who run is drawn anew five times in each step, and each candidate's, some "
    "0.1 ms a candidate",
    "cheapest": "what it would cost is told of everybody who runs",
    "andes": "it weighs every user of 256 that run and 64 that wait for each size of the batch, in NumPy columns",
    "multi_bin": "of a burst 256 a plan are put into bins, until all are",
}
"""What in a policy's key takes the time where it is over the target."""

Names = tuple[str, str, str, str, str]
"""Scheduler, queue, admission, preemption, eviction."""


@dataclass(frozen=True)
class Row:
    """Times of one kind of step under one stack, in microseconds."""

    scheduler: str
    queue: str
    admission: str
    preemption: str
    eviction: str
    kind: str
    waiting: int
    steps: int
    plan_us_median: float
    plan_us_p99: float
    scheduler_us_median: float
    scheduler_us_p99: float
    admitted_mean: float
    preempted_mean: float
    growth: float | None = None  # times the median with the fewest waiting

    @property
    def moves(self) -> float:
        """Requests that a plan starts and stops."""
        return self.admitted_mean + self.preempted_mean


def names_of(row: Row) -> Names:
    """The stack of a row."""
    return (row.scheduler, row.queue, row.admission, row.preemption, row.eviction)


def with_growth(rows: list[Row]) -> list[Row]:
    """Each with its time in terms of that of the same case with the fewest waiting, if there is one."""
    least = {(*names_of(row), row.kind): row for row in rows if row.waiting == WAITING[0]}
    grown = []
    for row in rows:
        first = least.get((*names_of(row), row.kind))
        grown.append(replace(row, growth=round(row.plan_us_median / first.plan_us_median, 2) if first else None))
    return grown


OWN = "over the target with {few:,} waiting too, so it is a step's own work and not the queue's"
MOVES = "more requests are started or stopped a step than with {few:,} waiting, each in at most 1.3 times as long"
GROWS = "a step that does as much takes longer than with {few:,} waiting"


def cause(first: Row | None, last: Row) -> str:
    """Which of the above a case over the target is, by the same with the fewest waiting."""
    if first is None:
        return GROWS
    if first.plan_us_median > TARGET_US:
        return OWN
    same = last.plan_us_median * first.moves <= 1.3 * first.plan_us_median * last.moves  # what is far in memory, aside
    return MOVES if same and last.moves > first.moves else GROWS


def show(rows: list[Row], running: int, console: Console) -> None:
    """One table for each kind of step."""
    at = {(*names_of(row), row.kind, row.waiting): row for row in rows}
    few, many = WAITING[0], WAITING[-1]
    for kind in dict.fromkeys(row.kind for row in rows):
        table = Table(title=f"{kind}: median microseconds a plan, {running} running")
        for title in ("scheduler", "queue", "admission", "preemption", "eviction"):
            table.add_column(title, no_wrap=True)
        titles = [*(f"{n // 1000}k waiting" for n in WAITING), "its p99", "policy", "growth", "naive/this"]
        for title in titles:
            table.add_column(title, justify="right")
        for last in rows:
            if last.kind != kind or last.waiting != many:
                continue
            key = (*names_of(last), last.kind)
            cells = [at.get((*key, n)) for n in WAITING]
            first, naive = at.get((*key, few)), at.get((NAIVE, *key[1:], many))
            table.add_row(
                *key[:5],
                *(f"{row.plan_us_median:,.0f}" if row else "" for row in cells),
                f"{last.plan_us_p99:,.0f}",
                f"{last.scheduler_us_median:,.0f}",
                f"{last.plan_us_median / first.plan_us_median:.2f}x" if first else "",
                f"{naive.plan_us_median / last.plan_us_median:,.0f}x" if naive else "",
                style="red" if last.plan_us_median > TARGET_US and last.scheduler != NAIVE else None,
            )
        console.print(table)
    explain(rows, console)


def explain(rows: list[Row], console: Console) -> None:
    """What is over the target, and why; what does not come from the queue is told from what grows with it."""
    few, many = WAITING[0], WAITING[-1]
    first_of = {(*names_of(row), row.kind): row for row in rows if row.waiting == few}
    own = [row for row in rows if row.scheduler != NAIVE and row.waiting == many]
    slow = [row for row in own if row.plan_us_median > TARGET_US]
    worst = max(own, key=lambda row: row.plan_us_median)
    console.print(
        f"{len(own) - len(slow)} of {len(own)} within {TARGET_US:,.0f} microseconds with {many:,} waiting; "
        f"the slowest is {', '.join(names_of(worst))}, {worst.kind}: {worst.plan_us_median:,.0f}"
    )
    causes: dict[str, list[Row]] = {OWN: [], MOVES: [], GROWS: []}
    for row in sorted(slow, key=lambda row: -row.plan_us_median):
        causes[cause(first_of.get((*names_of(row), row.kind)), row)].append(row)
    for said, group in causes.items():
        console.print(f"{len(group)} of those over it: {said.format(few=few)}")
        for row in group:
            first = first_of.get((*names_of(row), row.kind))
            before = f", {first.plan_us_median:,.0f} with {first.moves:.1f}" if first else ""
            stack = " + ".join(names_of(row)[:4])
            console.print(f"  {stack}, {row.kind}: {row.plan_us_median:,.0f} with {row.moves:.1f} moved{before}")
    for name, why in WHY.items():
        if any(name == policy.split(",")[0] for row in slow for policy in names_of(row)):
            console.print(f"{name}: {why}")
