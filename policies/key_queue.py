"""A queue for any order that a request's own key fixes while it waits."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

from policies.contract import Queue, does_nothing
from policies.draft import Draft
from policies.plan import Report
from policies.request import Request

Rank = float | tuple[float, ...]
Entry = tuple[Rank, int, int, Request]


def first_of(queue: Queue, now: int) -> Request:
    """What a queue shows, for its `pop`. Raises IndexError when it is empty."""
    request = queue.peek(now)
    if request is None:
        raise IndexError("the queue is empty")
    return request


class KeyQueue(ABC):
    """Smallest key first, ties by (arrival, id). Push and pop O(log n), remove O(1) amortised.

    A removed request leaves its entry in the heap behind, which is skipped when it comes up, also where the request
    waits again by then: to give it another rank, remove it and push it again (`rerank`).
    """

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._waiting: dict[int, Entry] = {}

    @abstractmethod
    def rank(self, request: Request) -> Rank:
        """The request's place, a number or (for all) a tuple; lower goes first. Must not change while it waits."""

    def order(self, request: Request) -> tuple[Rank, int, int]:
        """The request's place among all requests, if its rank says something for those that run, too."""
        return (self.rank(request), request.arrival_ns, request.id)

    def preemptible(self, request: Request) -> bool:
        """Whether it may be stopped, once it runs, for a request that is ahead of it."""
        return True

    def push(self, request: Request, now: int) -> None:
        if request.id not in self._waiting:
            entry = (self.rank(request), *request.key, request)
            self._waiting[request.id] = entry
            heapq.heappush(self._heap, entry)

    def rerank(self, request: Request, now: int) -> None:
        """Give a waiting request the place that its rank says now."""
        if request.id in self._waiting:
            self.remove(request)
            self.push(request, now)

    def peek(self, now: int) -> Request | None:
        heap = self._heap
        while heap:
            request = heap[0][3]
            if self._waiting.get(request.id) is heap[0]:
                return request
            heapq.heappop(heap)
        return None

    def pop(self, now: int) -> Request:
        request = first_of(self, now)
        heapq.heappop(self._heap)
        del self._waiting[request.id]
        return request

    def remove(self, request: Request) -> None:
        self._waiting.pop(request.id, None)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = list(self._waiting.values())
            heapq.heapify(self._heap)

    def begin(self, draft: Draft, now: int) -> None:  # noqa: B027  (an answer, not a gap)
        """Nothing about the replica changes the order."""

    @does_nothing  # noqa: B027  (an answer, not a gap)
    def on_report(self, report: Report) -> None:
        """What ran does not change the order."""
