"""The order in which one replica plans, launches and reports: the same lines for both panels.

`lag=0`: plan, run, report. `lag=1`: plan step N+1 while step N runs, so a report comes one step late. A panel drives
the generator and does what it is told; the runtime with threads and a device, the simulator with a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

from policies.control_plane import ControlPlane
from policies.plan import Report, Step


@dataclass(slots=True)
class Deliver:
    """Hand the control plane what has arrived (`submit`, `cancel`), then answer with the time; None ends the loop.

    Or answer with the steps in flight, eldest first, where the panel has taken steps by itself (`ControlPlane.repeat`),
    or with one that it has planned by itself and that runs nothing.
    """


@dataclass(slots=True)
class Launch:
    """Note who stopped running, and start the step if it `runs`. Steps run one after another, in this order."""

    step: Step


@dataclass(slots=True)
class Collect:
    """Wait for this step to end and answer with its report."""

    step: Step


@dataclass(slots=True)
class Idle:
    """Nothing runs: wait until something arrives, or until `wake_at`."""

    wake_at: int | None


_DELIVER = Deliver()
Action = Deliver | Launch | Collect | Idle


Answer = int | list[Step] | Step | Report | None


def send(loop: Generator[Action, Answer, None], answer: Answer) -> Action | None:
    """Answer the loop's last action. Returns its next one, or None once it has ended."""
    try:
        return loop.send(answer)
    except StopIteration:
        return None


def step_loop(plane: ControlPlane, lag: int) -> Generator[Action, Answer, None]:
    """The calls of one replica, in order.

    `Deliver` is answered with now (int), with a list (see there), or with None to end once the steps in flight are in;
    `Collect` with a Report.
    """
    in_flight: deque[Step] = deque()
    while True:
        now = yield _DELIVER
        if now is None:
            break
        runs = True
        if isinstance(now, list):
            in_flight = deque(now)
        elif isinstance(now, Step):
            step, runs = now, False
        else:
            assert isinstance(now, int)
            step = plane.plan(now)
            yield Launch(step)
            runs = step.runs
            if runs:
                in_flight.append(step)
        if in_flight and (len(in_flight) > lag or not runs):
            report = yield Collect(in_flight.popleft())
            assert isinstance(report, Report)
            plane.report(report)
        elif not in_flight:
            yield Idle(step.wake_at)
    while in_flight:
        report = yield Collect(in_flight.popleft())
        assert isinstance(report, Report)
        plane.report(report)
