"""How long each request has been served, from what really ran."""

from __future__ import annotations

from policies.contract import View
from policies.plan import Report
from policies.request import Request


class ServiceTime:
    """The durations of the steps that each request took part in, in nanoseconds, over all of its admissions.

    A step lasts from its launch, or from the end of the step before it where that is later, to its end. A request that
    decodes with the group is not touched by a step: its time is read off the group's. O(what changed) a report.
    A request that has ended and was forgotten is not charged for steps that were in flight then.
    """

    def __init__(self) -> None:
        self._own: dict[int, int] = {}
        self.group_ns = 0  # summed over the steps of the decode group, so far
        self._joined_at: dict[int, int] = {}  # member of the group -> `group_ns` when it joined
        self._last_end = 0
        self._begun = False

    def begin(self, view: View) -> None:
        """Before each plan: who decoded before this object was put in counts from now on."""
        if not self._begun:
            self._begun = True
            self._joined_at.update((request.id, self.group_ns) for request in view.decoding())

    def of(self, request: Request) -> int:
        """Nanoseconds of service so far, as reported."""
        own = self._own.get(request.id, 0)
        joined = self._joined_at.get(request.id)
        return own if joined is None else own + self.group_ns - joined

    def on_report(self, report: Report) -> int:
        """Take in a step, and return how long it took. Who ended with it is to be told to `forget`."""
        step = report.step
        duration = max(0, report.end_ns - max(report.launch_ns, self._last_end))
        self._last_end = max(self._last_end, report.end_ns)
        ending = {request.id for request, _, _ in report.finished}
        for request in step.left:
            self._settle(request)
        if step.decode_all:
            for request in step.joined:
                if request.id in ending or not request.gone:
                    self._joined_at[request.id] = self.group_ns
            self.group_ns += duration
            for request in step.capped:
                self._settle(request)
        for request in (*step.decodes, *(chunk.request for chunk in step.chunks)):
            if request.id in ending or not request.gone:
                self._own[request.id] = self._own.get(request.id, 0) + duration
        return duration

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._own.pop(request.id, None)
        self._joined_at.pop(request.id, None)

    def take_off(self, request: Request, duration: int) -> None:
        """So much of what it was charged for a chunk is not to count."""
        if duration:
            self._own[request.id] -= duration

    def _settle(self, request: Request) -> None:
        joined = self._joined_at.pop(request.id, None)
        if joined is not None:
            self._own[request.id] = self._own.get(request.id, 0) + self.group_ns - joined
