"""Queues against a plain list that is sorted every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies import registry
from policies.contract import Queue
from policies.key_queue import KeyQueue
from policies.registry import PolicyError
from policies.request import Request

KEYS = {
    "fcfs": lambda r: (r.arrival_ns, r.id),
    "priority": lambda r: (r.priority, r.arrival_ns, r.id),
    "sjf": lambda r: (min(max(1, r.hints.get("output_tokens", r.max_tokens)), r.max_tokens), r.arrival_ns, r.id),
    "sjf,predictor=oracle": lambda r: (1000 - r.id % 3, r.arrival_ns, r.id),
}
ORACLE = {i: 1000 - i % 3 for i in range(1000)}

REQUESTS = st.builds(
    lambda *fixed, declared: (*fixed, {} if declared is None else {"output_tokens": declared}),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(-2, 2),
    declared=st.one_of(st.none(), st.floats(0, 6)),
)  # fmt: skip


def request(request_id: int, arrival: int = 0, cap: int = 8, priority: int = 0, hints: dict | None = None) -> Request:
    return Request(request_id, arrival, 4, cap, priority=priority, hints=hints or {})


class QueueAgainstSortedList(RuleBasedStateMachine):
    """One of each queue, all fed the same."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, Queue] = {name: registry.make("queue", name, oracle=ORACLE) for name in KEYS}
        self.waiting: dict[str, list[Request]] = {name: [] for name in KEYS}
        self.gone: list[Request] = []
        self.next_id = 0

    @rule(what=REQUESTS)
    def arrive(self, what: tuple[int, int, int, dict]) -> None:
        new = request(self.next_id, *what)
        self.next_id += 1
        for name, queue in self.queues.items():
            queue.push(new, 0)
            self.waiting[name].append(new)

    @rule(count=st.integers(1, 3))
    def serve(self, count: int) -> None:
        """Each takes its own first ones."""
        for name, queue in self.queues.items():
            for _ in range(min(count, len(self.waiting[name]))):
                first = min(self.waiting[name], key=KEYS[name])
                self.waiting[name].remove(first)
                assert queue.pop(0) is first

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data(), back=st.booleans())
    def cancel(self, data: st.DataObject, back: bool) -> None:
        """Out of every queue it still waits in; perhaps back again, as if it had been preempted."""
        everybody = {r.id: r for waiting in self.waiting.values() for r in waiting}
        gone = everybody[data.draw(st.sampled_from(sorted(everybody)))]
        for name, queue in self.queues.items():
            queue.remove(gone)
            self.waiting[name] = [r for r in self.waiting[name] if r is not gone]
            if back:
                queue.push(gone, 0)
                self.waiting[name].append(gone)

    @invariant()
    def the_first_is_shown(self) -> None:
        for name, queue in self.queues.items():
            assert queue.peek(0) is min(self.waiting[name], key=KEYS[name], default=None)


TestQueueAgainstSortedList = QueueAgainstSortedList.TestCase
TestQueueAgainstSortedList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("name", KEYS)
@given(work=st.lists(REQUESTS, max_size=30), order=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_requests_come_out_in_sorted_order_however_they_went_in(name: str, work: list, order: object) -> None:
    requests = [request(i, *what) for i, what in enumerate(work)]
    queue = registry.make("queue", name, oracle=ORACLE)
    shuffled = list(requests)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for one in shuffled:
        queue.push(one, 0)
    assert [queue.pop(0) for _ in requests] == sorted(requests, key=KEYS[name])
    assert queue.peek(0) is None


@pytest.mark.parametrize("name", KEYS)
def test_taking_from_an_empty_queue_is_an_error(name: str) -> None:
    queue = registry.make("queue", name, oracle=ORACLE)
    with pytest.raises(IndexError, match="the queue is empty"):
        queue.pop(0)


@pytest.mark.parametrize("name", KEYS)
def test_pushing_who_waits_already_changes_nothing(name: str) -> None:
    queue, one = registry.make("queue", name, oracle=ORACLE), request(0)
    queue.push(one, 0)
    queue.push(one, 5)
    assert queue.pop(0) is one
    assert queue.peek(0) is None


def test_a_request_that_left_and_came_back_with_another_rank_has_only_its_new_place() -> None:
    class ByPlace(KeyQueue):
        place: dict[int, float]

        def rank(self, request: Request) -> float:
            return self.place[request.id]

    queue, first, second = ByPlace(), request(0), request(1)
    queue.place = {0: 1, 1: 2}
    queue.push(first, 0)
    queue.push(second, 0)
    queue.remove(first)
    queue.place[0] = 3
    queue.push(first, 0)
    assert [queue.pop(0), queue.pop(0), queue.peek(0)] == [second, first, None]


def test_many_removals_do_not_pile_up() -> None:
    queue = registry.make("queue", "fcfs")
    stays = request(0)
    queue.push(stays, 0)
    for i in range(1, 5_000):
        gone = request(i, i)
        queue.push(gone, 0)
        queue.remove(gone)
    assert len(queue._heap) < 200
    assert queue.pop(0) is stays


def test_without_a_declared_length_shortest_first_goes_by_the_cap() -> None:
    queue = registry.make("queue", "sjf")
    declared, capped = request(0, cap=50, hints={"output_tokens": 9}), request(1, cap=8)
    queue.push(declared, 0)
    queue.push(capped, 0)
    assert [queue.pop(0), queue.pop(0)] == [capped, declared]


def test_only_a_queue_with_an_oracle_is_clairvoyant() -> None:
    assert registry.make("queue", "sjf,predictor=oracle", oracle=ORACLE).clairvoyant
    assert not registry.make("queue", "sjf", oracle=ORACLE).clairvoyant


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("sjf,predictor=oracle", "predictor=oracle needs output lengths known beforehand"),
        ("sjf,predictor=crystal", "there is no predictor 'crystal'; known: declared"),
    ],
)
def test_a_predictor_that_is_not_to_be_had_is_refused(spec: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        registry.make("queue", spec)
