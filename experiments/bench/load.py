"""Sending requests at their times, or so many at once, without falling behind unseen."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments.bench.measuring import Measured, measure
from runtime.client import AsyncClient

LATE_MS = 50.0
"""Lateness above which a generator's own delay shows in what it measures, and is warned of."""


@dataclass(slots=True)
class Counts:
    """How far a load is.

    `late_ns` is the largest lateness of a submission, `lag_ns` that of the event loop, which times the chunks.
    """

    sent: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    late_ns: int = 0
    lag_ns: int = 0

    @property
    def ended(self) -> int:
        """Answered or failed."""
        return self.completed + self.failed


class Load:
    """Sends requests and hands each over when it has ended.

    Args:
        client: whom to ask. Its retries should be 0: what is measured is one attempt.
        path: the endpoint.
        body: request number -> JSON body; called shortly before the request is due.
        on_end: called with each request when it ends, and with those in flight when the run is cancelled.
        timeout_s: for a whole answer.
        headers: request number -> further headers.
    """

    def __init__(
        self,
        client: AsyncClient,
        path: str,
        body: Callable[[int], bytes],
        on_end: Callable[[Measured], None],
        timeout_s: float,
        headers: Callable[[int], Mapping[str, str]] = lambda i: {},
    ) -> None:
        self._headers = headers
        self._client, self._path, self._body, self._on_end, self._timeout_s = client, path, body, on_end, timeout_s
        self._name = f"bench-{uuid.uuid4().hex[:8]}"  # a server may refuse an id that it has seen
        self._start_ns = time.perf_counter_ns()
        self.counts = Counts()

    def now_ns(self) -> int:
        """Nanoseconds since the run began."""
        return time.perf_counter_ns() - self._start_ns

    async def open_loop(self, due_ns: Sequence[int]) -> None:
        """Send request i at `due_ns[i]` (ascending), however many are in flight. The run begins now.

        An event loop's timers go by the millisecond: uvloop's may be half of one early.
        """
        self._start_ns = time.perf_counter_ns()
        async with asyncio.TaskGroup() as tasks:
            for i, due in enumerate(due_ns):
                body = self._body(i)
                await asyncio.sleep(max(0.0, (due - self.now_ns()) / 1e9))
                tasks.create_task(self._one(i, due, body))

    async def closed_loop(self, n: int, concurrency: int) -> None:
        """Send n requests, `concurrency` in flight, each due when another has ended. The run begins now."""
        numbers = iter(range(n))

        async def client() -> None:
            for i in numbers:
                body = self._body(i)
                await self._one(i, self.now_ns(), body)

        self._start_ns = time.perf_counter_ns()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(n, concurrency)):
                tasks.create_task(client())

    async def _one(self, i: int, due_ns: int, body: bytes) -> None:
        counts = self.counts
        measured = Measured(i, due_ns, self.now_ns())
        counts.late_ns = max(counts.late_ns, measured.sent_ns - due_ns)
        counts.sent += 1
        counts.running += 1
        try:
            headers = {"x-request-id": f"{self._name}-{i}", **self._headers(i)}
            await measure(self._client, self._path, body, headers, measured, self._timeout_s, self.now_ns)
        finally:
            counts.running -= 1
            if measured.completed:
                counts.completed += 1
            elif measured.end_ns is not None:
                counts.failed += 1
            self._on_end(measured)

    async def watch(self, on_tick: Callable[[Counts], None], every_s: float = 0.02) -> None:
        """Until cancelled: measure how late the event loop is, and tell `on_tick` how far the run is.

        Delays much shorter than `every_s` are not seen.
        """
        while True:
            before = time.perf_counter_ns()
            await asyncio.sleep(every_s)
            lag_ns = time.perf_counter_ns() - before - round(every_s * 1e9)
            self.counts.lag_ns = max(self.counts.lag_ns, lag_ns)
            on_tick(self.counts)
