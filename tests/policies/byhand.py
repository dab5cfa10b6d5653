"""A scheduler that plans what a test tells it, and a control plane around it."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from policies.admission.watermark import Watermark
from policies.contract import CostModel, View
from policies.control_plane import ControlPlane
from policies.eviction.lru import Lru
from policies.plan import Plan, Report, Step
from policies.preemption.last_admitted import LastAdmitted
from policies.prefix import block_keys
from policies.registry import make
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import PolicyStack
from tests.policies.harness import Log


class PlainQueue:
    """The half of a scheduler that waits: a plain list, so that a request that comes back twice shows."""

    def __init__(self) -> None:
        self.queue: list[Request] = []

    def add(self, request: Request, now: int) -> None:
        self.queue.append(request)

    def remove(self, request: Request, now: int) -> None:
        self.queue = [other for other in self.queue if other is not request]

    def on_report(self, report: Report) -> None:
        """Nobody is charged."""


class ByHand(PlainQueue):
    """`answer` makes the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[Report] = []
        self.answer: Callable[[View, int], Plan] = lambda view, now: Plan()

    def on_report(self, report: Report) -> None:
        self.reports.append(report)

    def plan(self, view: View, now: int) -> Plan:
        plan = self.answer(view, now)
        named = {r.id for r, _ in [*plan.chunks, *plan.drop, *plan.preempt]} | {
            r.id for r in [*plan.resume, *plan.decodes]
        }
        self.queue = [r for r in self.queue if r.id not in named]
        return plan


class Desk:
    """A control plane that is fed one plan at a time; every step takes 10 ns."""

    def __init__(
        self, limits: Limits, *, watermark: float = 0.0, offload: str = "never", cost: CostModel | None = None
    ) -> None:
        self.scheduler = ByHand()
        stack = PolicyStack(self.scheduler, Watermark(watermark), LastAdmitted(), Lru(), make("offload", offload))
        self.log = Log()
        self.ended: list[Request] = []
        self.plane = ControlPlane(limits, stack, cost=cost, recorder=self.log, on_end=self.ended.append, check=True)
        self.now = 0
        self._next_id = 0

    def submit(self, prompt: int, cap: int = 10, keys: tuple[bytes, ...] = ()) -> Request:
        request = Request(self._next_id, self.now, prompt, cap)
        self._next_id += 1
        self.plane.submit(request, self.now, keys)
        return request

    def plan(self, plan: Plan) -> Step:
        """Enact a plan; its report is still to come."""
        self.scheduler.answer = lambda view, now: plan
        return self.plane.plan(self.now)

    def report(self, step: Step, *finished: Request) -> None:
        self.now += 10
        ends = [(r, State.STOPPED, r.num_output_tokens) for r in finished]
        self.plane.report(Report(step, self.now - 10, self.now, 10, ends))

    def run(self, plan: Plan, *finished: Request) -> Step:
        """Enact a plan and report it, if there is anything to report."""
        step = self.plan(plan)
        if step.runs:
            self.report(step, *finished)
        return step

    def view_admits(self, request: Request) -> bool:
        """Whether a draft made now would take the request."""
        return self.plane.view.draft().admit(request)


def drawn(data: st.DataObject, desk: Desk) -> list[Request]:
    """Two to seven requests, submitted, that begin like one of two prompts; for blocks of 4 tokens."""
    prefixes = [block_keys([7] * 32, 4), block_keys([9] * 8 + [5] * 24, 4)]
    requests = []
    for _ in range(data.draw(st.integers(2, 7), label="requests")):
        keys = data.draw(st.sampled_from(prefixes))
        prompt = data.draw(st.integers(1, 20))
        requests.append(desk.submit(prompt, data.draw(st.integers(1, 8)), tuple(keys[: prompt // 4])))
    return requests
