from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

import numpy as np

from policies.alarms import Alarms
from policies.block_pool import num_blocks, num_idle
from policies.contract import CostModel, View
from policies.costing import prefill_ns
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import FOREVER, Plan, Report
from policies.registry import register
from policies.request import Request, State
from policies.schedulers.mixed import Mixed

Name = TypeVar("Name")
Entry = TypeVar("Entry")


@register("scheduler", "continuum")
class Continuum(Mixed):
    """Continuum: a call that ends in a tool call leaves its KV pinned for as long as the tool is worth waiting for.

    The step is `mixed`'s. The order, built in: preempted calls first, then those whose program's KV is pinned, then by
    arrival of the program. When a call of tool f ends, its blocks are pinned for

        tau* = argmax over observed durations tau of f:  CDF_f(tau) * (T * eta + reload) - tau    (nanoseconds),

    or not at all where none of these is above 0. CDF_f is the share of the last `window` durations of f that are at
    most tau; T the mean time that the last `window` returns without a pin waited until they were admitted; reload the
    prefill of the call's context, by the cost model; eta = -corr(k, N - k) over all calls k = 1 .. N of ended programs:
    how far the calls to come can be told from those that were (1 where all programs are equally long, and while there
    is no telling; 0 where it is negative). As long as f has fewer than `min_records` records, it is `default_ttl_ms`.

    A pin is lifted when it expires, unless the next call of its program waits by then; when that has been admitted; and
    where it would be a deadlock: nothing runs and the head of the queue does not fit, or one request runs and lacks
    blocks. Then the pins go first that nobody waits for, those of the programs that came last. While several run, they
    make room among themselves, as the stack's preemption says.

    `hints["tool"]` is the tool as a number; a call without is its program's last. The next call is known by `program`;
    the tool's duration is the time between. `remember`: so many programs and tools are kept, those heard of last.
    Where this departs: the paper's engine reads the tool off the output, here the client says it beforehand. The
    default TTL, the order of victims, what is a deadlock, and `window` are ours. To reload is taken
    to be computing again, whatever is in host memory. A program has one pin, that of its call that ended last.
    Needs a cost model. As `mixed`, and O(log) a call, O(`window`) when one ends, O(pins log pins) in a deadlock.
    Source: Li et al., "Continuum", arXiv 2511.02230.
    """

    needs_cost = True

    def __init__(
        self,
        default_ttl_ms: float = 1000.0,
        min_records: int = 100,
        window: int = 1000,
        remember: int = 10_000,
        long_prefill_threshold: int = 0,
    ) -> None:
        if default_ttl_ms < 0 or not 1 <= min_records <= window or window > 10_000 or remember < 1:
            raise ValueError("default_ttl_ms must be 0 or more, 1 <= min_records <= window <= 10000, remember above 0")
        self._order = Order(self._rank)
        super().__init__(self._order, long_prefill_threshold)
        self._default = round(default_ttl_ms * 1e6)
        self._min_records = min_records
        self._window = window
        self._remember = remember
        self._programs: dict[int, Program] = {}  # heard of longest ago first, like the tools
        self._tools: dict[float, Durations] = {}
        self._pins: dict[int, Pin] = {}  # by program
        self._untold: dict[int, Request] = {}  # ended requests whose pins have changed since the last plan
        self._expiry = Alarms()
        self._unpinned: set[int] = set()  # waiting calls that came back and found no pin
        self._delays: deque[int] = deque(maxlen=window)  # of those, until they were admitted
        self._turns = Turns()
        self._cost: CostModel | None = None
        self._draft: Draft | None = None

    def _program(self, request: Request) -> Program:
        if request.program is None:
            return Program(request.arrival_ns)
        return _heard(self._programs, request.program, Program(request.arrival_ns), self._remember)

    def _rank(self, request: Request) -> tuple[float, ...]:
        pin = None if request.program is None else self._pins.get(request.program)
        pinned = pin is not None and pin.follower is request
        return (request.num_preemptions == 0, not pinned, self._program(request).arrival)

    # Calls come and end

    def add(self, request: Request, now: int) -> None:
        program = self._program(request)
        if program.ended_ns is not None and request.program is not None:  # it has come back from a tool
            lasted = max(0, request.arrival_ns - program.ended_ns)
            _heard(self._tools, program.tool, Durations(self._window), self._remember).add(lasted)
            program.ended_ns = None
            pin = self._pins.get(request.program)
            if pin is not None and pin.until > now and pin.request.num_blocks:
                pin.follower, pin.until = request, FOREVER
                self._tell(pin.request)
            else:
                self._unpinned.add(request.id)
        super().add(request, now)

    def remove(self, request: Request, now: int) -> None:
        super().remove(request, now)
        self._unpinned.discard(request.id)
        self._let_go(request)
        if request.state in (State.STOPPED, State.LENGTH):
            self._end(request, now)
        elif request.num_blocks and request.state is not State.MOVING:  # which takes its pin with it
            self._tell(request)

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        for request in report.step.admitted:
            if request.id in self._unpinned:
                self._unpinned.discard(request.id)
                self._delays.append((request.first_scheduled_ns or 0) - request.arrival_ns)
            self._let_go(request)
        for request, _, _ in report.finished:
            self._end(request, report.end_ns)

    def _let_go(self, request: Request) -> None:
        """Nobody needs the pin any more that was kept for this call, if one was."""
        pin = None if request.program is None else self._pins.get(request.program)
        if pin is not None and pin.follower is request:
            self._drop(pin)

    def _end(self, request: Request, now: int) -> None:
        if request.program is None:
            return
        program, old = self._program(request), self._pins.get(request.program)
        program.calls += 1
        if old is not None:
            self._drop(old)
        if "tool" not in request.hints:
            self._turns.add(program.calls)
            del self._programs[request.program]
            return
        program.ended_ns, program.tool = now, request.hints["tool"]
        until = now + self.ttl(request)
        if until > now and request.num_blocks:
            self._pins[request.program] = Pin(request, until, program.arrival)
        self._tell(request)

    def ttl(self, request: Request) -> int:
        """tau*: how long the blocks of a call that ends now are worth keeping."""
        records = self._tools.get(request.hints["tool"])
        if records is None or len(records) < self._min_records or self._cost is None:
            return self._default
        delay = sum(self._delays) / len(self._delays) if self._delays else 0.0
        return records.ttl(delay * self._turns.eta() + prefill_ns(self._cost, request.num_tokens))

    # Pins

    def plan(self, view: View, now: int) -> Plan:
        self._cost = view.cost
        plan = super().plan(view, now)
        assert self._draft is not None
        for request in self._draft.admitted:
            if request.program is not None and "tool" in request.hints:
                plan.pin.append((request, FOREVER))  # it may end with any step
        return plan

    def start(self, view: View, now: int) -> Draft:
        self._draft = draft = super().start(view, now)
        for request in self._expiry.due(now):
            self._drop(self._pins[request.program or 0])
        for request in self._untold.values():
            pin = self._pins.get(request.program or 0)
            if not request.num_blocks:
                continue
            if pin is not None and pin.request is request:
                draft.plan.pin.append((request, pin.until))
            else:
                draft.lift_pin(request, now)
        self._untold.clear()
        if self._pins and len(view.running) <= 1:
            self._end_deadlock(view, draft, now)
        return draft

    def _tell(self, request: Request) -> None:
        self._untold[request.id] = request
        pin = self._pins.get(request.program or 0)
        if pin is not None and pin.request is request and pin.follower is None:
            self._expiry.set(request, pin.until)
        else:
            self._expiry.cancel(request)

    def _drop(self, pin: Pin) -> None:
        del self._pins[pin.request.program or 0]
        self._tell(pin.request)

    def _end_deadlock(self, view: View, draft: Draft, now: int) -> None:
        """Lift pins that would keep the only one that runs from going on, or the first that waits where none runs."""
        missing = len(view.decodes_that_need_a_block())
        for request in view.prefilling.values():
            most = min(draft.tokens_left, self._max_chunk or draft.tokens_left)
            missing = draft.blocks_needed(request, min(request.num_pending_tokens, most))
        head = None if view.running else self._order.peek(now)
        if head is not None:
            hit = () if head.num_blocks else view.probe(head).blocks
            missing = num_blocks(head.num_tokens, view.block_size) - head.num_blocks - len(hit) + num_idle(hit)
        if missing <= draft.blocks_left:
            return
        victims = sorted(self._pins.values(), key=lambda pin: (pin.follower is None, pin.arrival, pin.request.key))
        while victims and missing > draft.blocks_left:
            pin = victims.pop()
            self._drop(pin)
            del self._untold[pin.request.id]
            if pin.request.num_blocks:
                draft.lift_pin(pin.request, now)
            if pin.follower is not None:
                self._unpinned.add(pin.follower.id)
                self._order.rerank(pin.follower, now)


@dataclass(slots=True)
class Program:
    """What is known of a program that may go on."""

    arrival: int
    calls: int = 0  # that have ended
    ended_ns: int | None = None  # when its last one did, as long as a tool is running
    tool: float = 0.0


@dataclass(slots=True)
class Pin:
    """The blocks of an ended call, kept until a time or for the next call, which waits."""

    request: Request
    until: int
    arrival: int  # of the program
    follower: Request | None = None


class Order(KeyQueue):
    """The waiting calls in an order that the scheduler says."""

    def __init__(self, rank: Callable[[Request], tuple[float, ...]]) -> None:
        super().__init__()
        self._rank = rank

    def rank(self, request: Request) -> tuple[float, ...]:
        return self._rank(request)


class Durations:
    """How long a tool took, the last times."""

    def __init__(self, window: int) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._window = window

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, duration: int) -> None:
        self._recent.append(duration)
        insort(self._sorted, duration)
        if len(self._recent) > self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def ttl(self, gain: float) -> int:
        """argmax over observed durations tau of CDF(tau) * gain - tau; 0 if that is not above 0."""
        count = len(self._sorted)
        worth = np.arange(1, count + 1) * (gain / count) - np.array(self._sorted, float)
        best = int(worth.argmax())
        return self._sorted[best] if worth[best] > 0 else 0


class Turns:
    """eta = -corr(k, N - k) over the calls k = 1 .. N of programs that are over, from sums of whole numbers."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._yy = self._xy = 0

    def add(self, calls: int) -> None:
        done, squares = calls * (calls + 1) // 2, calls * (calls + 1) * (2 * calls + 1) // 6
        self._n += calls
        self._x += done
        self._y += done - calls
        self._xx += squares
        self._yy += squares - calls * calls
        self._xy += calls * done - squares

    def eta(self) -> float:
        """Between 0 and 1; 1 while there is no telling."""
        spread = (self._n * self._xx - self._x**2) * (self._n * self._yy - self._y**2)
        if spread <= 0:
            return 1.0
        return max(0.0, (self._x * self._y - self._n * self._xy) / sqrt(spread))


def _heard(table: dict[Name, Entry], name: Name, new: Entry, most: int) -> Entry:
    """Its entry, `new` if it has none, moved to the end; the first goes where there are more than so many."""
    table[name] = entry = table.pop(name, new)
    if len(table) > most:
        del table[next(iter(table))]
    return entry
