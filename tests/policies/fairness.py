"""What tests of fair queues share: who was given how much while who waited, and tenants that differ in their wants."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st

from policies.plan import Step
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.decisions import decisions, outcomes
from tests.policies.harness import Drive, Job

SCHEDULERS = ["mixed", "sarathi,chunk_size=24", "prefill_first", "static,max_batch_size=3"]


class Watched(Drive):
    """Keeps, step by step, who waits after the plan and what each tenant was given: input at its first admission."""

    def __init__(self, limits: Limits, queue: str, work: list[Job], scheduler: str = "mixed", **roles: str) -> None:
        self.waits: dict[int, set[str]] = {}
        self.served: dict[int, Counter[str]] = {}
        self._paid: set[int] = set()
        super().__init__(limits, StackSpec(scheduler, queue, **roles), work)

    @property
    def queue(self) -> Any:
        return self.stack.scheduler.queue  # type: ignore[attr-defined]

    def _deliver(self, now: int) -> None:
        super()._deliver(now)
        self.look()

    def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
        self.waits[step.index] = {r.tenant for r in self.plane.view.requests.values() if r.state is State.WAITING}  # type: ignore[attr-defined]
        ended = super()._execute(step)
        given: Counter[str] = Counter()
        for request in step.admitted:
            if request.id not in self._paid:
                self._paid.add(request.id)
                given[request.tenant] += self.num_input(request)
        for request in sampled(self, step):
            given[request.tenant] += 2
        self.served[step.index] = given
        self.look()
        return ended

    def num_input(self, request: Request) -> int:
        return request.num_prompt_tokens

    def look(self) -> None:
        """Called after arrivals, and after each plan that runs something."""

    def service(self, first: int = 0, last: int = 1_000_000) -> Counter[str]:
        """Service by tenant in the steps first <= index < last."""
        return sum((given for index, given in self.served.items() if first <= index < last), Counter())

    def largest_difference(self, one: str, other: str) -> int:
        """Of the service of two tenants, over all intervals in which both have somebody waiting throughout."""
        largest, low, high, now = 0, 0, 0, 0
        for index in sorted(self.served):
            if not {one, other} <= self.waits[index]:
                low = high = now = 0
                continue
            now += self.served[index][one] - self.served[index][other]
            low, high = min(low, now), max(high, now)
            largest = max(largest, high - low)
        return largest


def sampled(drive: Drive, step: Step) -> list[Request]:
    """The requests that get a token in this step, one by one."""
    group = [drive.requests[i] for i in drive.running[step.index]]
    return [*group, *step.capped, *step.decodes, *(chunk.request for chunk in step.chunks if chunk.samples)]


def plain(num_blocks: int = 400, seqs: int = 6, budget: int = 32, lag: int = 0) -> Limits:
    return Limits(num_blocks, 4, seqs, budget, 400, prefix_caching=False, lag=lag)


@st.composite
def jobs(draw: st.DrawFn, tenants: str = "abc", cancels: bool = False) -> list[Job]:
    """Of tenants that differ in how much they want."""
    made = []
    for tenant in tenants:
        longest = draw(st.sampled_from([4, 40]))
        for _ in range(draw(st.integers(0, 14))):
            output = draw(st.integers(1, longest))
            made.append(
                Job(
                    draw(st.integers(1, longest)),
                    output,
                    draw(st.integers(0, 40)),
                    output + draw(st.integers(0, 5)),
                    cancel=draw(st.one_of(st.none(), st.integers(0, 60))) if cancels else None,
                    tenant=tenant,
                    hints={"output_tokens": draw(st.integers(1, 45))},
                )
            )
    return made or [Job(1, 1, tenant=tenants[0])]


M = 160  # tokens of KV cache
LONGEST = 40
U = max(LONGEST, 2 * M)


def flood() -> list[Job]:
    """Three tenants that always have somebody waiting; the first asks for eight times what the second does."""
    return [
        *(Job(20, 20, tenant="a") for _ in range(80)),
        *(Job(20, 20, tenant="b") for _ in range(10)),
        *(Job(4, 4, tenant="c") for _ in range(30)),
    ]


def interleaved(work: list[Job]) -> list[Job]:
    """In an order of arrival in which everybody's share stays what it is."""
    place: Counter[str] = Counter()
    size = Counter(job.tenant for job in work)
    keyed = []
    for job in work:
        keyed.append((place[job.tenant] / size[job.tenant], job.tenant, job))
        place[job.tenant] += 1
    return [job for _, _, job in sorted(keyed, key=lambda entry: entry[:2])]


def same(limits: Limits, work: list[Job], queue: str, scheduler: str) -> None:
    fair, fcfs = (Drive(limits, StackSpec(scheduler, name), work) for name in (queue, "fcfs"))
    assert decisions(fair) == decisions(fcfs)
    assert outcomes(fair) == outcomes(fcfs)
