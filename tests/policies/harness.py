"""Drives a control plane without a panel: every step takes a fixed time, every request has a known true length."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.control_plane import ControlPlane, RequestRefused
from policies.loop import Collect, Deliver, Idle, Launch, step_loop
from policies.plan import Report, Step
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.shapes import StepShape
from policies.stack import StackSpec

STEP_NS = 1_000


@dataclass
class Log:
    """A recorder that keeps everything."""

    requests: list[tuple] = field(default_factory=list)
    steps: list[tuple] = field(default_factory=list)
    decisions: list[tuple] = field(default_factory=list)

    def request(self, row: tuple) -> None:
        self.requests.append(row)

    def step(self, row: tuple) -> None:
        self.steps.append(row)

    def decision(self, row: tuple) -> None:
        self.decisions.append(row)


@dataclass
class Job:
    """One request to serve: arrives before the `arrives`-th call of plan()."""

    prompt: int
    output: int
    arrives: int = 0
    cap: int | None = None
    keys: tuple[bytes, ...] = ()
    cancel: int | None = None
    priority: int = 0
    tenant: str = ""
    session: int | None = None
    program: int | None = None
    slo: Slo | None = None
    hints: dict[str, float] = field(default_factory=dict)


class LinearCost:
    """A step costs something, each token more, and each token of context a little."""

    def step_ns(self, shape: StepShape) -> int:
        work = 20 * shape.padded_tokens + shape.decode_context + shape.chunk_pairs // 8
        return 200 + work + 4 * (shape.swapped_out + shape.swapped_in)


class Drive:
    """Serve `jobs` (ids 0, 1, ... in order) to the end, the invariants checked (`check`) after every call.

    `tokens[i]` counts what request i was given, `steps` has every step; `served[i]` is its tokens step by step.
    """

    def __init__(
        self, limits: Limits, stack: StackSpec, jobs: list[Job], *, max_plans: int = 20_000, check: bool = True
    ) -> None:
        self.limits, self.jobs = limits, jobs
        self.log = Log()
        self.steps: list[Step] = []
        self.refused: dict[int, str] = {}
        oracle = {i: job.output for i, job in enumerate(jobs)}
        future = {i: jobs[i].keys for i in sorted(range(len(jobs)), key=self._order)}
        self.stack = stack.build(block_size=limits.block_size, oracle=oracle, future=future)
        self.requests = [
            Request(
                i, job.arrives * STEP_NS, job.prompt, job.cap or job.output, priority=job.priority, tenant=job.tenant,
                session=job.session, program=job.program, slo=job.slo, hints={"output_tokens": job.output, **job.hints},
            )
            for i, job in enumerate(jobs)
        ]  # fmt: skip
        self.plane = ControlPlane(limits, self.stack, cost=LinearCost(), recorder=self.log, check=check)
        self.running: dict[int, list[int]] = {}
        self._left_to_arrive = sorted(range(len(jobs)), key=self._order)
        self._cancels = sorted((job.cancel, i) for i, job in enumerate(jobs) if job.cancel is not None)
        self._ends: dict[int, list[tuple[Request, State, int]]] = {}
        self._counted: dict[int, int] = {}
        self._run(max_plans)
        self.plane.close()

    def _order(self, i: int) -> tuple[int, int]:
        """The place of job i in the order of arrival."""
        return self.jobs[i].arrives, i

    def _run(self, max_plans: int) -> None:
        loop, now = step_loop(self.plane, self.limits.lag), 0
        action = next(loop)
        answer: int | Report | None
        while self.plane.next_step < max_plans:
            answer = None
            if isinstance(action, Deliver):
                self._deliver(now)
                answer = now
            elif isinstance(action, Launch):
                self.steps.append(action.step)
                if action.step.runs:
                    self._ends[action.step.index] = self._execute(action.step)
            elif isinstance(action, Collect):
                now += STEP_NS
                answer = Report(action.step, now - STEP_NS, now, STEP_NS, self._ends.pop(action.step.index))
            elif isinstance(action, Idle):
                if not self._left_to_arrive and not self.plane.num_live:
                    return
                now = max(now + STEP_NS, action.wake_at or 0)
            action = loop.send(answer)
        raise AssertionError(f"not done after {max_plans} plans: {self.plane.num_live} requests alive")

    def _deliver(self, now: int) -> None:
        index = self.plane.next_step
        idle = not self.plane.num_live
        while self._left_to_arrive and (self.jobs[self._left_to_arrive[0]].arrives <= index or idle):
            i = self._left_to_arrive.pop(0)
            idle = False
            self.requests[i].arrival_ns = now
            try:
                self.plane.submit(self.requests[i], now, self.jobs[i].keys)
            except RequestRefused as refusal:
                self.refused[i] = str(refusal)
        while self._cancels and self._cancels[0][0] <= index:
            self.plane.cancel(self._cancels.pop(0)[1], now)

    def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
        """The slow way: look at every request that computes, one by one."""
        group = self.plane.decode_group() if step.decode_all else []
        self.running[step.index] = [r.id for r in group]
        ended = []
        sampled = [c.request for c in step.chunks if c.samples] + list(step.decodes) + [*group, *step.capped]
        for request in sampled:
            length = min(self.jobs[request.id].output, request.max_tokens)
            if request.num_output_tokens == length and not request.state.ended:
                how = State.LENGTH if length == request.max_tokens else State.STOPPED
                if self._counted.get(request.id) != length:
                    self._counted[request.id] = length
                    ended.append((request, how, length))
        return ended

    def status(self, i: int) -> str:
        return next(dict(zip(REQUESTS, row, strict=True))["status"] for row in self.log.requests if row[0] == i)

    def output_tokens(self, i: int) -> int:
        return next(dict(zip(REQUESTS, row, strict=True))["output_tokens"] for row in self.log.requests if row[0] == i)
