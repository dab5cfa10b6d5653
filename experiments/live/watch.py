"""Watching a live server and its twin: who came, how they fared in both, and how far these are apart so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.live.server import About, Event, LiveServer, Page
from experiments.live.twin import Twin
from simulator.costs.base import CostModel

KEEP_REQUESTS = 20_000
"""Requests that the error is worked out from: the newest ones."""
KEEP_SAMPLES = 10_000
PAGES = 50
"""Pages of events taken at one poll, at most."""


@dataclass(slots=True)
class Fate:
    """What became of a request on one side. Nanoseconds on the server's clock."""

    arrival_ns: int
    first_token_ns: int
    end_ns: int
    output_tokens: int

    @property
    def ttft_ms(self) -> float:
        return (self.first_token_ns - self.arrival_ns) / 1e6

    @property
    def e2e_ms(self) -> float:
        return (self.end_ns - self.arrival_ns) / 1e6

    @property
    def tpot_ms(self) -> float:
        """nan of a request of one token."""
        return (
            (self.end_ns - self.first_token_ns) / 1e6 / (self.output_tokens - 1) if self.output_tokens > 1 else np.nan
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """How things stood at a poll. `kv_share`: of the blocks, in percent, nan where nothing is known yet."""

    at_ns: int
    running: int
    waiting: int
    kv_share: float
    output_tokens: int


Costs = Callable[[About], CostModel]


class Watch:
    """A server and its twin from the moment of attaching on; `poll` goes on with both.

    The twin gets the requests that are alive at that moment too, and those that came since the first of them, so that
    it is as busy; compared are those that come later. Its cache is empty at first. Where the server restarts, its
    policies or replicas are changed, or events are lost, both begin anew, and `renewed` says why.

    Args:
        costs: makes the twin's cost model from what the server says of itself.

    Raises LiveError.
    """

    def __init__(self, server: LiveServer, costs: Costs) -> None:
        self._server = server
        self._costs = costs
        self.about = server.about()
        self.cost = costs(self.about)
        self.renewed = ""
        self._begin(server.events(-1))

    def _begin(self, page: Page) -> None:
        self.run, self._last = page.run, -1
        self._setting = _setting(page)
        serving = sum(engine.state == "serving" for engine in page.engines) or 1
        self.replicas = serving
        self.twin = Twin(self.about, page.stack, page.router, serving, self.cost)
        self.attached_ns = page.now_ns
        self.now_ns = page.now_ns
        self.samples: deque[Sample] = deque(maxlen=KEEP_SAMPLES)
        self.server_fates: dict[int, Fate] = {}
        self.twin_fates: dict[int, Fate] = {}
        self.errors: deque[tuple[int, dict[str, float]]] = deque(maxlen=KEEP_SAMPLES)
        self._arrivals: dict[int, int] = {}  # id -> time, of those that may still end on either side
        self._backlog = self._collect(page)

    def _collect(self, page: Page) -> list[Event]:
        """Everything up to now: what the twin is to be given of it."""
        events = list(page.events)
        while page.more:
            page = self._server.events(page.last)
            events += page.events
        self._last, self.attached_ns, self.now_ns = page.last, page.now_ns, page.now_ns
        alive = {request_id for request_id, _ in page.alive}
        came = [event for event in events if event.kind == "arrival"]
        begin = min((event.at_ns for event in came if event.id in alive), default=page.now_ns)
        fed = {event.id for event in came if event.at_ns >= begin}
        return [event for event in events if event.id in fed]

    def poll(self, budget_s: float = 0.5) -> None:
        """Ask the server what is new, and let the twin follow for `budget_s` seconds of computing at most.

        Raises LiveError; what is known stays as it is then.
        """
        for event in self._backlog:
            self._take(event)
        self._backlog = []
        for _ in range(PAGES):
            page = self._server.events(self._last)
            if why := self._why_anew(page):
                self.about = self._server.about()
                self.cost = self._costs(self.about)
                self._begin(self._server.events(-1))
                self.renewed = why
                return
            for event in page.events:
                self._take(event)
            self._last = page.last
            if not page.more:
                self.now_ns = page.now_ns
                self.twin.stands(page)
                self.samples.append(_sample(page))
                break
            self.now_ns = page.events[-1].at_ns if page.events else self.now_ns
        self.twin.advance(self.now_ns, budget_s)
        for request_id, first, end, tokens, status in self.twin.take_ended():
            arrival = self._arrivals.get(request_id)
            if arrival is not None and status in ("stop", "length") and first is not None and end is not None:
                _keep(self.twin_fates, request_id, Fate(arrival, first, end, tokens))
        self._note_errors()

    @property
    def lag_s(self) -> float:
        """How far the twin is behind the server."""
        return (self.now_ns - self.twin.now_ns) / 1e9

    def _why_anew(self, page: Page) -> str:
        if page.run != self.run:
            return "the server was started anew"
        if page.oldest > self._last + 1:
            return "more events came than the server keeps"
        if _setting(page) != self._setting:
            return "the server's policies or replicas were changed"
        return ""

    def _take(self, event: Event) -> None:
        if event.kind == "arrival":
            self._arrivals[event.id] = event.at_ns
            while len(self._arrivals) > 2 * KEEP_REQUESTS:
                del self._arrivals[next(iter(self._arrivals))]
            self.twin.arrives(event)
            return
        self.twin.ends(event)
        arrival = self._arrivals.get(event.id)
        if arrival is not None and event.reason in ("stop", "length") and event.first_token_ns is not None:
            fate = Fate(arrival, event.first_token_ns, event.at_ns, event.output_tokens)
            _keep(self.server_fates, event.id, fate)

    def pairs(self) -> list[tuple[Fate, Fate]]:
        """(server, twin) of the requests that came since attaching and are done in both."""
        both = self.server_fates.keys() & self.twin_fates.keys()
        chosen = sorted(i for i in both if self.server_fates[i].arrival_ns >= self.attached_ns)
        return [(self.server_fates[i], self.twin_fates[i]) for i in chosen]

    def _note_errors(self) -> None:
        found = {f"{row.statistic} {row.latency}": row.error for row in differences(self.pairs())}
        if found:
            self.errors.append((self.now_ns, found))

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True, slots=True)
class Difference:
    """A statistic of a latency on both sides, in milliseconds. `error`: the twin's over the server's, minus one."""

    latency: str
    statistic: str
    server: float
    twin: float

    @property
    def error(self) -> float:
        return self.twin / self.server - 1 if self.server else np.nan


def differences(pairs: list[tuple[Fate, Fate]]) -> list[Difference]:
    """Mean and p99 of TTFT, TPOT and E2E over the same requests on both sides; those without a sample are left out."""
    found = []
    for latency in ("ttft", "tpot", "e2e"):
        both = np.array([[getattr(fate, f"{latency}_ms") for fate in pair] for pair in pairs]).reshape(-1, 2)
        both = both[~np.isnan(both).any(axis=1)]
        if not len(both):
            continue
        mean, p99 = both.mean(axis=0), np.percentile(both, 99, axis=0)
        found += [
            Difference(latency.upper(), "mean", *map(float, mean)),
            Difference(latency.upper(), "p99", *map(float, p99)),
        ]
    return found


def _keep(fates: dict[int, Fate], request_id: int, fate: Fate) -> None:
    fates[request_id] = fate
    if len(fates) > KEEP_REQUESTS:
        del fates[next(iter(fates))]


def _sample(page: Page) -> Sample:
    blocks = sum(engine.num_blocks for engine in page.engines)
    free = sum(engine.num_blocks if engine.free_blocks is None else engine.free_blocks for engine in page.engines)
    return Sample(
        page.now_ns,
        sum(engine.running for engine in page.engines),
        sum(engine.waiting for engine in page.engines),
        100 * (1 - free / blocks) if blocks else np.nan,
        page.output_tokens,
    )


def _setting(page: Page) -> tuple[object, ...]:
    serving = tuple(engine.id for engine in page.engines if engine.state == "serving")
    return (tuple(sorted(page.stack.items())), page.router, serving)
