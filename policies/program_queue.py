"""What queues have in common that rank a call by what its program was served (Agentix)."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from policies.alarms import Alarms
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.request import Request, State
from policies.service_time import ServiceTime


@dataclass(slots=True)
class Program:
    """A line of the process table, in nanoseconds."""

    service: int  # with which its next call starts
    wait: int = 0  # W_p, of its ended calls
    time: int = 0  # T_p, of its ended calls


@dataclass(slots=True)
class Call:
    """A live request. `start`, `wait` and `time` are its program's as it came."""

    start: int
    wait: int
    time: int
    level: int
    entered: int  # when it came to this level
    meter: int  # own service at which its quantum of this level began
    outputs: int  # tokens that it had when it was started last
    since: int | None = None  # when it began to wait, if it does
    waited: int = 0  # W_c before that, since it came or was promoted
    promoted: int = 0  # own service when it came or was promoted; T_c is what came since then


class ProgramQueue(KeyQueue):
    """Levels by service, each with a quantum; first come, first served within one, by when a call came to it.

    Quantum and width of level i are `quantum_ms` * `factor`^i: a call that comes with a service of S joins the level in
    whose range S lies, and moves one down when it has used up a quantum there; what it was served beyond counts in the
    next. The last level has no quantum. `demote=false`: no quanta, a call stays in the level that it joined.

    Nobody starves: a waiting call goes to level 0 once (W_p + W_c) / (T_p + T_c) >= `beta` (0: never), W being time
    waited and T time served, of the ended calls of its program (as it came) and its own. Its own start anew then; but
    T_c goes on if it got no token when it ran last. Else, where memory is short, two could be promoted and stop each
    other for ever; as it is, they wait longer each time.

    A request of no program is a program of one call. As nothing says that a program is over, the `remember` programs
    heard of last are kept; of one that is forgotten, a call that lives still knows what it came with.
    """

    def __init__(
        self,
        quantum_ms: float = 500.0,
        factor: float = 2.0,
        levels: int = 8,
        beta: float = 10.0,
        demote: bool = True,
        remember: int = 10_000,
    ) -> None:
        super().__init__()
        if quantum_ms <= 0 or factor < 1 or beta < 0:
            raise ValueError("quantum_ms must be above 0, factor at least 1, beta at least 0")
        if not 1 <= levels <= 1000 or factor**levels > 1e9 or remember < 1:
            raise ValueError("levels must be 1 to 1000 with factor^levels at most 1e9, remember at least 1")
        self._quanta = [max(1, round(quantum_ms * 1e6 * factor**i)) for i in range(levels - 1)]
        self._ends = list(accumulate(self._quanta))  # of the ranges of all levels but the last
        self._beta = beta
        self._demote = demote
        self._remember = remember
        self._programs: dict[int, Program] = {}  # heard of longest ago first
        self._calls: dict[int, Call] = {}
        self._service = ServiceTime()
        self._clock = 0  # durations of all steps; nobody's service grows faster
        self._used_up = Alarms()  # by that clock, the earliest that a running call's quantum can be used up
        self._starved = Alarms()  # when a waiting call below the top is to be promoted
        self._begun = False

    @abstractmethod
    def start(self, request: Request, program: Program) -> int:
        """The service that a new call of this program comes with, in nanoseconds."""

    @abstractmethod
    def charge(self, request: Request, program: Program, start: int, time: int) -> None:
        """A call that came with `start` has ended after a service of `time`."""

    def level(self, request: Request) -> int:
        return self._call(request).level

    def rank(self, request: Request) -> tuple[float, ...]:
        call = self._call(request)
        return (call.level, call.entered)

    def _call(self, request: Request) -> Call:
        call = self._calls.get(request.id)
        if call is None:
            program = self._program(request) or Program(0)
            start = self.start(request, program)
            level, served = bisect_right(self._ends, start), self._service.of(request)
            call = Call(start, program.wait, program.time, level, request.arrival_ns, served, request.num_output_tokens)
            self._calls[request.id] = call
        return call

    def _program(self, request: Request) -> Program | None:
        """Its line of the table, if there is one, which has been heard of now."""
        name = request.program
        if name is None or name not in self._programs:
            return None
        self._programs[name] = program = self._programs.pop(name)
        return program

    # Waiting

    def push(self, request: Request, now: int) -> None:
        call = self._call(request)
        super().push(request, now)
        if call.since is None:
            call.since = now
        self._watch_wait(request, call)

    def pop(self, now: int) -> Request:
        request = super().pop(now)
        call = self._calls[request.id]
        call.outputs = request.num_output_tokens
        self._stop_waiting(request, call, now)
        return request

    def remove(self, request: Request) -> None:
        super().remove(request)
        if request.gone:
            self._end(request)

    def begin(self, draft: Draft, now: int) -> None:
        self._service.begin(draft.view)
        if not self._begun:  # who ran before this queue did
            self._begun = True
            for request in draft.view.running.values():
                self._watch_quantum(request, self._call(request))
        for request in self._starved.due(now):
            call, served = self._calls[request.id], self._service.of(request)
            if self._starves_at(request, call) > now:  # a step in flight has served it since it was stopped
                self._watch_wait(request, call)
                continue
            call.level, call.entered, call.meter = 0, now, served
            call.since, call.waited = now, 0
            if request.num_output_tokens > call.outputs:
                call.promoted = served
            self.rerank(request, now)

    def _stop_waiting(self, request: Request, call: Call, now: int) -> None:
        if call.since is not None:
            call.waited += now - call.since
            call.since = None
        self._starved.cancel(request)

    def _watch_wait(self, request: Request, call: Call) -> None:
        if self._beta and call.level > 0 and call.since is not None:
            self._starved.set(request, self._starves_at(request, call))

    def _starves_at(self, request: Request, call: Call) -> int:
        """When a waiting call will have waited `beta` times as long as it was served."""
        assert call.since is not None
        served = call.time + self._service.of(request) - call.promoted
        return call.since - call.wait - call.waited + round(self._beta * served)

    # Being served

    def on_report(self, report: Report) -> None:
        self._clock += self._service.on_report(report)
        step = report.step
        for request in (*step.admitted, *step.resumed):
            if not request.state.ended:
                self._watch_quantum(request, self._call(request))
        for request in self._used_up.due(self._clock):
            self._sink(request, report.end_ns)
        for request, _, _ in report.finished:
            self._end(request)

    def _watch_quantum(self, request: Request, call: Call) -> None:
        if self._demote and call.level < len(self._quanta):
            used = self._service.of(request) - call.meter
            self._used_up.set(request, self._clock + max(0, self._quanta[call.level] - used))

    def _sink(self, request: Request, now: int) -> None:
        call, served = self._calls[request.id], self._service.of(request)
        while call.level < len(self._quanta) and served - call.meter >= self._quanta[call.level]:
            call.meter += self._quanta[call.level]
            call.level += 1
            call.entered = now
        if request.state is State.RUNNING:
            self._watch_quantum(request, call)
        self.rerank(request, now)  # if it was stopped while the step ran

    def _end(self, request: Request) -> None:
        call, time = self._call(request), self._service.of(request)
        del self._calls[request.id]
        self._service.forget(request)
        self._used_up.cancel(request)
        self._stop_waiting(request, call, request.finish_ns or 0)
        name = request.program
        if name is None:
            return
        program = self._program(request)
        if program is None:
            program = self._programs[name] = Program(call.start, call.wait, call.time)
            if len(self._programs) > self._remember:
                del self._programs[next(iter(self._programs))]
        program.wait += call.waited
        program.time += time - call.promoted
        self.charge(request, program, call.start, time)
