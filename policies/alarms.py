"""Times at which something about a request falls due."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from policies.request import Request

Entry = tuple[int, int, int, Request]


class Alarms:
    """At most one time a request; those that have come are given in order, ties by (arrival, id). O(log n) each."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._set: dict[int, Entry] = {}

    def set(self, request: Request, time: int) -> None:
        """Put its time, in place of one that it had."""
        entry = (time, *request.key, request)
        self._set[request.id] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._set) + 64:
            self._heap = list(self._set.values())
            heapq.heapify(self._heap)

    def cancel(self, request: Request) -> None:
        self._set.pop(request.id, None)

    @property
    def first(self) -> int | None:
        """The next time that is set."""
        while self._heap and self._set.get(self._heap[0][3].id) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: int) -> Iterator[Request]:
        """Take out those whose time has come; meanwhile others may be set."""
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._set.get(entry[3].id) is entry:
                del self._set[entry[3].id]
                yield entry[3]
