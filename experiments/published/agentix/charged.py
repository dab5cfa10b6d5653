"""The charging rule that makes the paper's own figure."""

from __future__ import annotations

from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.request import Request, State
from policies.service_time import ServiceTime


class ChargedAtOnce(KeyQueue):
    """Least service of the program, of the call that runs, too; at equal service, whoever runs goes on."""

    def __init__(self, goes_on: bool = True) -> None:
        super().__init__()
        self._goes_on = goes_on
        self._ended: dict[int | None, int] = {}
        self._service = ServiceTime()

    def rank(self, request: Request) -> tuple[float, ...]:
        served = self._ended.get(request.program, 0) + self._service.of(request)
        return (served, self._goes_on and request.state is not State.RUNNING)

    def on_report(self, report: Report) -> None:
        self._service.on_report(report)
        for request, _, _ in report.finished:
            self._ended[request.program] = self._ended.get(request.program, 0) + self._service.of(request)
