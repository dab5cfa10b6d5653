"""When things happen on a simulated replica: computed by a cost model, or as a recorded run had them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from policies.plan import NO_COPIES, CopyTimes, Step
from policies.records import Times
from policies.shapes import StepShape
from simulator.copy_links import CopyLinks, without_copies
from simulator.costs.base import CostModel
from simulator.costs.history import HasHistory, History


class Timing(NamedTuple):
    """One step: handed to the device at `launch_ns`, result known to the host at `end_ns`."""

    launch_ns: int
    end_ns: int
    device_ns: int
    copies: CopyTimes = NO_COPIES


class Pace(Protocol):
    """The host and the device of one replica, as two clocks. Called in the order of `policies.loop`."""

    def plan_at(self, index: int, now: int) -> int | None:
        """When the host gets to call plan() for the index-th time; None: never again."""
        ...

    def launch(self, step: Step, now: int) -> None: ...
    def end_of(self, step: Step) -> Timing: ...
    def reported(self, step: Step, now: int) -> None: ...
    def waits_when_idle(self) -> bool:
        """Whether an idle replica sleeps until something arrives (a recording says itself when it goes on)."""
        ...


class ComputedPace:
    """Step times from a cost model: the device runs steps one after another, the host works beside it.

    Under `lag=0` the loop makes a step last prepare + device + finish; under `lag=1` the host's share of one step
    overlaps the device's share of another. `plan_lead_ns`: as in `policies.replica_state.Limits`.
    """

    def __init__(self, costs: CostModel, plan_lead_ns: int | None = None) -> None:
        self._costs = costs
        self._lead = plan_lead_ns
        self._history = costs.history() if isinstance(costs, HasHistory) else None
        self._host_free = 0
        self._device_free = 0
        self._plan_from = 0
        self._links = CopyLinks(costs)
        # Launch, end, device, finish and copies of steps in flight.
        self._timings: dict[int, tuple[int, int, int, int, CopyTimes]] = {}

    def plan_at(self, index: int, now: int) -> int | None:
        return max(now, self._host_free, self._plan_from)

    def launch(self, step: Step, now: int) -> None:
        shape = step.shape
        prepare, device, finish = self._costs.cost(shape)
        launch = self._host_free = now + prepare
        start = max(launch, self._device_free) if self._history is None else self._start(launch, self._history)
        copies = NO_COPIES
        if shape.swapped_out or shape.swapped_in:
            shape = without_copies(shape)
            device = self._costs.cost(shape).device_ns
            copies = self._links.times(step, device, launch, start)
        wait = copies.wait_ns
        if self._history is not None:
            usual = device
            device = self._history.device_ns(shape, usual, start + wait)
            self._history.ran(shape, usual, start + wait, device)
        device += wait
        self._device_free = start + device
        if self._lead is not None:
            self._plan_from = self._device_free - self._lead if step.shape.num_chunks else 0
        self._timings[step.index] = (launch, self._device_free, device, finish, copies)

    def _start(self, launch: int, history: History) -> int:
        """When the device begins a step that is meant to be launched then."""
        return max(launch, self._device_free) + history.delay_ns(self._device_free - launch)

    def end_of(self, step: Step) -> Timing:
        launch, end, device, _, copies = self._timings[step.index]
        return Timing(launch, max(end, self._host_free), device, copies)  # the host may still prepare the next step

    def reported(self, step: Step, now: int) -> None:
        self._host_free = now + self._timings.pop(step.index)[3]

    def coast(
        self, shapes: Iterator[StepShape], most: int, now: int, horizon: float, watched: bool, may_be_open: bool
    ) -> tuple[list[Times], bool]:
        """With no step in flight: plan, launch and report up to `most` steps of these shapes, one after another as soon
        as that can be. None that is planned, or if `watched` ends, at `horizon` or later; but where the last one
        `may_be_open`, that may end later. Whether it does."""
        cost, history, taken = self._costs.cost, self._history, []
        plan, free = max(now, self._host_free, self._plan_from), self._device_free
        is_open = False
        for shape in islice(shapes, most):
            if plan >= horizon:
                break
            prepare, device, finish = cost(shape)
            launch = plan + prepare
            start = launch if launch > free else free
            usual = device
            if history is not None:
                start += history.delay_ns(free - launch)
                device = history.device_ns(shape, usual, start)
            end = start + device
            if watched and end >= horizon:
                if not may_be_open:
                    break
                is_open = True
            if history is not None:
                history.ran(shape, usual, start, device)
            taken.append((plan, launch, end, device))
            plan, free = end + finish, end
            if is_open:
                break
        if taken:
            self._device_free, self._host_free, self._plan_from = free, plan, 0
        return taken, is_open

    def waits_when_idle(self) -> bool:
        return True


class RecordedPace:
    """The step times of a recorded run, to the nanosecond. `rows[i]`: (plan_ns, timing) of the i-th plan."""

    def __init__(self, rows: Sequence[tuple[int, Timing]]) -> None:
        self._rows = rows

    def plan_at(self, index: int, now: int) -> int | None:
        return self._rows[index][0] if index < len(self._rows) else None

    def launch(self, step: Step, now: int) -> None:
        """The record knows the rest."""

    def end_of(self, step: Step) -> Timing:
        return self._rows[step.index][1]

    def reported(self, step: Step, now: int) -> None:
        """The record knows when the host goes on."""

    def waits_when_idle(self) -> bool:
        return False
