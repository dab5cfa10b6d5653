from __future__ import annotations

from collections import deque

from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.registry import register
from policies.request import Request

EXCESS = "over the tenant's requests per minute"


@register("queue", "rpm")
class Rpm(KeyQueue):
    """Requests per minute: so many of each tenant in any window, first come first served; what is idle stays idle.

    A tenant's request is released as soon as fewer than `limit` of its tenant's were released in the `window_s` seconds
    before; released requests are served in the order of their release. A request that is not released waits even if
    nothing else does, so capacity is wasted while a tenant is over its limit: the negative control of VTC's paper.

    `limit`: requests; `window_s`: seconds. `excess`: `wait` releases a request when the window has room; `drop` sheds
    one that comes while the window is full, as the published code does (there a window counts both of its ends).
    A request that has run is not held again, and a cancelled one has used its release.
    Cost: O(log n) a request.
    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, section 5.1, and its published code.
    """

    def __init__(self, limit: int = 30, window_s: float = 60.0, excess: str = "wait") -> None:
        super().__init__()
        if limit < 1 or window_s <= 0:
            raise ValueError("limit must be at least 1 and window_s above 0")
        if excess not in ("wait", "drop"):
            raise ValueError(f"excess must be wait or drop, not {excess!r}")
        self._limit = limit
        self._window_ns = round(window_s * 1e9)
        self._drops = excess == "drop"
        self._new: dict[int, Request] = {}  # came since the last plan
        self._excess: dict[int, Request] = {}
        self._released: dict[str, deque[int]] = {}  # a tenant's last `limit` releases, by time
        self._release_of: dict[int, int] = {}

    def rank(self, request: Request) -> float:
        return self._release_of.get(request.id, request.arrival_ns)  # of those that it never queued

    def push(self, request: Request, now: int) -> None:
        if request.id not in self._release_of and request.first_scheduled_ns is not None:
            self._release_of[request.id] = request.arrival_ns  # it ran before this object was put in place
        if request.id in self._release_of:
            super().push(request, now)
        else:
            self._new[request.id] = request

    def _admit_new(self, now: int) -> None:
        """Give those who came their release, in order of arrival whatever the order in which they were handed in."""
        for request in sorted(self._new.values(), key=lambda request: request.key):
            last = self._released.setdefault(request.tenant, deque(maxlen=self._limit))
            full_until = last[0] + self._window_ns if len(last) == self._limit else request.arrival_ns
            if self._drops and full_until > request.arrival_ns:
                self._excess[request.id] = request
                continue
            release = max(request.arrival_ns, full_until)
            last.append(release)
            self._release_of[request.id] = release
            super().push(request, now)
        self._new = {}

    def begin(self, draft: Draft, now: int) -> None:
        self._admit_new(now)
        for request in self._excess.values():
            draft.drop(request, EXCESS)
        self._excess = {}
        first = super().peek(now)
        if first is not None and self._release_of[first.id] > now:
            draft.wake_at(self._release_of[first.id])

    def peek(self, now: int) -> Request | None:
        self._admit_new(now)
        first = super().peek(now)
        return None if first is None or self._release_of[first.id] > now else first

    def remove(self, request: Request) -> None:
        self._new.pop(request.id, None)
        self._excess.pop(request.id, None)
        super().remove(request)
        if request.gone:
            self._release_of.pop(request.id, None)

    def on_report(self, report: Report) -> None:
        for request in (*(r for r, _, _ in report.finished), *(r for r, _ in report.step.dropped)):
            self._release_of.pop(request.id, None)
