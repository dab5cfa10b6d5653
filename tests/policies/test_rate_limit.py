"""Requests per minute: what is too much waits or is shed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from policies import registry
from policies.request import Request
from tests.policies.fairness import Watched, plain
from tests.policies.harness import Job


def arrive(queue: Any, *arrivals_s: float, tenant: str = "a", first_id: int = 0) -> list[Request]:
    made = [Request(first_id + i, round(at * 1e9), 5, 5, tenant=tenant) for i, at in enumerate(arrivals_s)]
    for request in reversed(made):
        queue.push(request, request.arrival_ns)
    return made


def begin(queue: Any, now_s: float) -> SimpleNamespace:
    said = SimpleNamespace(dropped=[], wakes=[], view=None)
    said.drop = lambda request, reason: said.dropped.append(request.id)
    said.wake_at = said.wakes.append
    queue.begin(said, round(now_s * 1e9))
    return said


def test_excess_requests_wait_until_the_window_has_room() -> None:
    queue = registry.make("queue", "rpm,limit=2")
    arrive(queue, 0, 1, 2, 3, 70)
    arrive(queue, 4, tenant="b", first_id=9)
    seconds = [10**9 * n for n in (0, 1, 4, 60, 61, 120)]
    for at, expected in zip(seconds, [0, 1, 9, 2, 3, 4], strict=True):
        assert begin(queue, (at - 1) / 1e9).wakes == [at]
        assert queue.peek(at - 1) is None
        assert queue.pop(at).id == expected
    assert begin(queue, 200).wakes == []


def test_or_are_shed_where_the_window_is_full_when_they_come() -> None:
    queue = registry.make("queue", "rpm,limit=2,excess=drop")
    arrive(queue, 0, 1, 2, 59.9, 60, 60.5, 61)
    assert begin(queue, 61).dropped == [2, 3, 5]
    assert [queue.pop(61 * 10**9).id for _ in range(4)] == [0, 1, 4, 6]
    assert begin(queue, 61).dropped == []


def test_shed_requests_end_as_dropped_and_the_others_with_their_tokens() -> None:
    work = [Job(5, 5, tenant="a") for _ in range(5)]
    drive = Watched(plain(), "rpm,limit=2,excess=drop", work)
    assert [drive.status(i) for i in range(5)] == ["length"] * 2 + ["dropped"] * 3


def test_who_has_run_is_not_held_again() -> None:
    work = [Job(12, 40, tenant="a") for _ in range(4)]
    drive = Watched(plain(26), "rpm,limit=4", work)
    assert sum(len(step.preempted) for step in drive.steps) > 0
    assert max(r.finish_ns or 0 for r in drive.requests) < 10**9
