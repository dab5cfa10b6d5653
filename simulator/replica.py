"""One simulated replica: a SimPy process that drives a control plane, one event a step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import simpy

from policies.control_plane import ControlPlane, RequestRefused
from policies.loop import Action, Answer, Collect, Deliver, Idle, Launch, send, step_loop
from policies.plan import Report, Step
from policies.records import Times
from policies.request import Request, State
from policies.shapes import StepShape
from simulator.arrivals import Arrival
from simulator.disk import Disk
from simulator.endings import Endings
from simulator.pace import ComputedPace, Pace, Timing

if TYPE_CHECKING:
    from simulator.movements import Movements

FAILED = "the replica has failed"
Ended = list[tuple[Request, State, int]]


class SimulatedReplica:
    """Carries out what the control plane says, in simulated time.

    `on_end(request)` is called for every request that ends here. As a router sees it (`policies.contract.Replica`), a
    replica's figures include what waits at its door for the next plan, or for KV that is fetched for it.

    `together`: do not ask for steps that the policy would plan alike, and go on without an event of the simulation's as
    far as nothing else happens in it. `watched`: somebody may look in then, and is to find the replica as it is.
    """

    movements: Movements | None = None
    """Where KV moves between replicas: what carries it."""
    failed = False
    unknown_end: Callable[[], simpy.Event | None] | None = None
    """Where lengths become known as the simulation goes on: what the step just planned is to wait for, or None."""

    def __init__(
        self, env: simpy.Environment, plane: ControlPlane, pace: Pace, on_end: Callable[[Request], None]
    ) -> None:
        self.plane = plane
        plane.on_end = self._ended
        self._env = env
        self._pace = pace
        self._on_end = on_end
        self.together = False
        self.watched = True
        self._arrivals: list[Arrival] = []
        self._cancellations: list[int] = []
        self._disk = Disk(plane.limits)
        self._from_disk: list[int] = []  # blocks that have come there or from there
        self._endings = Endings()
        self._ends_of_step: dict[int, Ended] = {}
        self._in_flight: list[Step] = []
        self.now = 0  # ahead of the simulation's while nothing else happens in it
        self._is_open = False  # whether a step that changes nothing but counts is running, until `_open_end`
        self._open_end = 0
        self._asleep: simpy.Event | None = None
        self._expected: dict[int, Arrival] = {}  # those whose KV is being fetched
        self._cancelled: set[int] = set()  # of those
        self._reported: simpy.Event | None = None
        self.process = env.process(self._run())

    # As a router sees it

    @property
    def id(self) -> int:
        return self.plane.replica

    @property
    def num_waiting(self) -> int:
        """All that is here and does not run, swapped and paused ones too: what a coordinator counts of a real one."""
        return self.plane.num_live - self.plane.num_running + len(self._arrivals) + len(self._expected)

    @property
    def num_running(self) -> int:
        return self.plane.num_running

    @property
    def num_prefill_tokens(self) -> int:
        return self.plane.num_prefill_tokens + self._tokens_at_the_door

    @property
    def num_outstanding_tokens(self) -> int:
        return self.plane.num_outstanding_tokens + self._tokens_at_the_door

    @property
    def _tokens_at_the_door(self) -> int:
        return sum(a.request.num_prompt_tokens for a in (*self._arrivals, *self._expected.values()))

    @property
    def num_blocks(self) -> int:
        return self.plane.limits.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.plane.num_free_blocks

    def match(self, keys: Any) -> int:
        return self.plane.match(keys)

    @property
    def num_incoming_blocks(self) -> int:
        return self.plane.transfers.num_incoming_blocks

    def decoding(self) -> Iterator[Request]:
        for request in self.plane.view.decoding():
            if self.movements is None or not self.movements.is_moving(request):
                yield request

    # What comes in

    def receive(self, arrival: Arrival) -> None:
        """A request arrives; the control plane gets it before its next plan."""
        request_id = arrival.request.id
        self._expected.pop(request_id, None)
        self._arrivals.append(arrival)
        if self.failed or request_id in self._cancelled:
            self._cancelled.discard(request_id)
            self._cancellations.append(request_id)
        self.wake()

    def expect(self, arrival: Arrival) -> None:
        """A request will arrive once KV has been fetched for it."""
        self._expected[arrival.request.id] = arrival

    def cancel(self, request_id: int) -> None:
        """A client goes away."""
        if request_id in self._expected:
            self._cancelled.add(request_id)
            return
        self._cancellations.append(request_id)
        self.wake()

    def fail(self) -> None:
        """Everything that is here ends, and nothing runs here any more."""
        self.failed = True
        now = int(self._env.now)
        self._cancellations += [arrival.request.id for arrival in self._arrivals]
        self._cancelled.update(self._expected)
        for request_id in self.plane.live_ids:
            self.plane.cancel(request_id, now, error=FAILED)
        self.wake()

    def wake(self) -> None:
        if self._asleep is not None and not self._asleep.triggered:
            self._asleep.succeed()

    def _deliver(self, now: int) -> None:
        """Submissions in the order of their stamps, then cancellations by id: the engine's order too."""
        if self._arrivals:
            arrivals, self._arrivals = self._arrivals, []  # who is refused may have others come: before the next plan
            for arrival in sorted(arrivals, key=lambda arrival: arrival.request.key):
                with suppress(RequestRefused):  # which the control plane has recorded
                    self.plane.submit(arrival.request, now, arrival.keys, hands_off=arrival.hands_off)
                    self._endings.expect(arrival)
        if self._cancellations:
            # So may who is cancelled, whom a failed one refuses.
            cancelled, self._cancellations = self._cancellations, []
            for request_id in sorted(cancelled):
                self.plane.cancel(request_id, now, error=FAILED if self.failed else "")
        if self._from_disk:
            come, self._from_disk = self._from_disk, []
            for number in come:
                self.plane.disk_done(number, "", now)
        if self.movements is not None:
            self.plane.transfers.let_run(now)
            self.movements.look()

    def _ended(self, request: Request) -> None:
        self._endings.forget(request.id)
        self._on_end(request)

    def correct_length(self, arrival: Arrival) -> None:
        """Its `output_tokens` are known now."""
        self._endings.correct(arrival)

    # Requests that leave and come

    @property
    def makes_room(self) -> bool:
        """Whether memory will be free here without anybody's leaving for another replica."""
        view = self.plane.view
        return not self.failed and bool(view.running or view.paused or self.plane.transfers.receiving)

    def has(self, request: Request) -> bool:
        """Whether it runs here."""
        return self.plane.view.running.get(request.id) is request

    def hand_over(self, request: Request, target: SimulatedReplica) -> None:
        """Its KV has arrived there."""
        now = int(self._env.now)
        self.plane.transfers.hand_over(request, now)
        target._endings.put(request.id, self._endings.take(request.id))
        target.plane.transfers.take_in(request, now)
        self.wake()
        target.wake()

    def take_back(self, request: Request) -> None:
        """It stays here after all."""
        self.plane.transfers.take_back(request, int(self._env.now))
        self.wake()

    def next_report(self) -> simpy.Event:
        """Succeeds when the next step's report is in."""
        if self._reported is None:
            self._reported = self._env.event()
        return self._reported

    def _after_report(self, step: Step) -> None:
        if self.movements is not None:
            # A prompt's last token may have been computed by itself, like a decode.
            firsts = [chunk.request for chunk in step.chunks if chunk.samples]
            for request in (*firsts, *step.joined, *step.decodes):
                if request.hands_off and self.plane.transfers.export(request, int(self._env.now)):
                    self.movements.prefilled(request, self)
        if self._reported is not None:
            self._reported.succeed()
            self._reported = None

    # The loop

    def _run(self) -> Generator[simpy.Event, Any, None]:
        """Do what `step_loop` says, and answer it.

        `Deliver` is answered with the time at which the control plane is to plan (None: never again), or with what was
        taken here without the loop (`_take_together`); `Collect` with the report. `self.now` is the replica's time;
        SimPy's catches up in the timeouts, which are left out where nothing else can happen before (`_has_to_wait`).
        """
        env, pace = self._env, self._pace
        loop = step_loop(self.plane, self.plane.limits.lag)
        action: Action | None = next(loop)
        while action is not None:
            answer: Answer = None
            if isinstance(action, Deliver):
                answer = self._take_together() if self.together else None
                # While a step of `_coast` is open, its end comes first; else the time of the plan does.
                while self._is_open or (answer is None and self._has_to_wait(self._plan_at())):
                    until = self._open_end if self._is_open else self._plan_at()
                    yield env.timeout(until - env.now)
                    self.now = max(self.now, until)
                    if self._is_open:
                        self._is_open = False
                        self.plane.end_coast()
                    answer = self._take_together() if self.together else None
                plan_at = None if answer is not None else pace.plan_at(self.plane.next_step, self.now)
                if plan_at is not None:
                    self.now = max(self.now, plan_at)
                    answer = self._repeat_or_deliver()
            elif isinstance(action, Launch):
                while self.unknown_end is not None and (known := self.unknown_end()) is not None:
                    yield known
                self._launch(action.step, self.now)
            elif isinstance(action, Collect):
                timing = pace.end_of(action.step)
                if self._has_to_wait(timing.end_ns):
                    yield env.timeout(timing.end_ns - env.now)
                self.now = max(self.now, timing.end_ns)
                answer = self._report(action.step, timing, self.now)
            elif isinstance(action, Idle) and pace.waits_when_idle():
                yield from self._sleep(action.wake_at)
                self.now = max(self.now, int(env.now))
            action = send(loop, answer)
            if isinstance(answer, Report):
                self._after_report(answer.step)

    def _plan_at(self) -> int:
        """When the next plan can be; now, where it never can."""
        plan_at = self._pace.plan_at(self.plane.next_step, self.now)
        return int(self._env.now) if plan_at is None else plan_at

    def _has_to_wait(self, time: int) -> bool:
        """Whether something else may happen in the simulation until then."""
        env = self._env
        return time > env.now and (not self.together or time >= env.peek())

    def _launch(self, step: Step, now: int) -> None:
        ended = self._endings.of(step)
        if step.disk:
            self._use_disk(step, now)
        if step.runs:
            self._pace.launch(step, now)
            self._ends_of_step[step.index] = ended
            self._in_flight.append(step)

    def _use_disk(self, step: Step, now: int) -> None:
        for number, end in self._disk.ends(step.disk, now):
            callbacks = self._env.timeout(end - self._env.now).callbacks
            assert callbacks is not None  # of an event that has not come
            callbacks.append(partial(self._has_come, number))

    def _has_come(self, number: int, event: simpy.Event) -> None:
        self._from_disk.append(number)
        self.wake()

    def _repeat_or_deliver(self) -> int | list[Step]:
        """The time of a plan has come: take its step at once where it is known, else have the policy asked."""
        if self.together and not (self._arrivals or self._cancellations):
            step = self.plane.repeat(self.now)
            if step is not None:
                self._launch(step, self.now)
                return self._in_flight[:]
        self._deliver(self.now)
        return self.now

    def _take_together(self) -> list[Step] | Step | None:
        """Take the steps that are planned before anything else happens in the simulation, without its events. Those
        that the policy would plan like the last one are not asked for. Each is enacted, timed and recorded as if it had
        been. Returns those in flight, where these are others than before; or a step that runs nothing. Where the last
        one changes nothing but counts it may be left open, until its end."""
        plane, pace, lag, taken = self.plane, self._pace, self.plane.limits.lag, False
        while True:
            horizon = self._env.peek()  # looked up each time: who ends here may have others come
            step = None
            repeats = plane.may_repeat and not (self._arrivals or self._cancellations)
            if repeats and not (lag or self._in_flight) and isinstance(pace, ComputedPace):
                self._is_open = self._coast(pace, horizon)
                if self._is_open:
                    return None
            plan_at = pace.plan_at(plane.next_step, self.now)
            if plan_at is None or plan_at >= horizon:
                break
            if repeats:
                step = plane.repeat(plan_at)
            if step is None:
                if lag or self._in_flight or self.unknown_end is not None:
                    break
                self.now = plan_at
                self._deliver(plan_at)
                step = plane.plan(plan_at)
                horizon = self._env.peek()
            self.now, taken = plan_at, True
            self._launch(step, plan_at)
            if not step.runs:
                return step
            if len(self._in_flight) > lag:
                due = self._in_flight[0]
                timing = pace.end_of(due)
                if self.watched and timing.end_ns >= horizon:
                    break
                self.now = max(plan_at, timing.end_ns)
                plane.report(self._report(due, timing, self.now))
        return self._in_flight[:] if taken and self._in_flight else None

    def _coast(self, pace: ComputedPace, horizon: float) -> bool:
        """The same for steps that change nothing but counts. Whether the last one is to be waited for.

        The control plane asks `time` how long steps of these shapes take; the pace answers for those that end before
        the horizon. A last one that ends after it is open: planned and running, to be seen so until `_open_end`.
        """
        left, joining, clock = self.plane.regrouping()

        def time(shapes: Iterator[StepShape], most: int, may_be_open: bool) -> tuple[list[Times], bool]:
            times, is_open = pace.coast(shapes, most, self.now, horizon, self.watched, may_be_open)
            if times:
                self._endings.regroup(left, joining, clock)
                left.clear()
                joining.clear()
                planned, _, end, _ = times[-1]
                self.now = planned if is_open else end
                self._open_end = end
            return times, is_open

        return self.plane.coast(self._endings.next_due(joining, clock), time)

    def _report(self, step: Step, timing: Timing, now: int) -> Report:
        """Its result is known to the host."""
        del self._in_flight[0]
        self._pace.reported(step, now)
        ended = self._ends_of_step.pop(step.index)
        return Report(step, timing.launch_ns, now, timing.device_ns, ended, timing.copies)

    def _sleep(self, wake_at: int | None) -> Generator[simpy.Event, Any, None]:
        if self._arrivals or self._cancellations or self._from_disk:
            return
        plane = self.plane
        if wake_at is None and plane.num_live and not (plane.transfers.underway or plane.awaits_disk):
            return  # the policy is asked once more; the control plane does not let it plan nothing twice
        self._asleep = self._env.event()
        if wake_at is None:
            yield self._asleep
        elif wake_at > self.now:
            yield self._asleep | self._env.timeout(wake_at - self._env.now)
        self._asleep = None
