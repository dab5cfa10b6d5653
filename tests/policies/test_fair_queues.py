"""Fair queues: what they charge against a slow reference, and what their papers prove or show of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Hit
from policies.plan import Mode, Plan, Report, Step
from policies.prefix import block_keys
from policies.queues.dlpm import Dlpm
from policies.queues.drr import Drr
from policies.queues.vtc import Vtc
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from policies.tenant_queue import SCALE, TenantQueue
from tests.policies.byhand import Desk
from tests.policies.decisions import decisions, outcomes
from tests.policies.harness import STEP_NS, Drive, Job

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


# What tenants are charged


class Audited(Watched):
    """After each report the counters are what a walk over all requests comes to."""

    num_reports = 0

    def _deliver(self, now: int) -> None:
        if "on_report" not in vars(self.queue):
            self._given: Counter[int] = Counter()
            self._final: dict[int, int] = {}
            own = self.queue.on_report

            def on_report(report: Report) -> None:
                own(report)
                self._count(report)

            self.queue.on_report = on_report
        super()._deliver(now)

    def _count(self, report: Report) -> None:
        for request in sampled(self, report.step):
            if request.id not in self._final:
                self._given[request.id] += 1
        self._final.update((request.id, n) for request, _, n in report.finished)
        expected: Counter[str] = Counter()
        for request in self.requests:
            if request.first_scheduled_ns is None:
                continue
            if request.state is State.CANCELLED:
                self._final[request.id] = request.num_output_tokens
            declared = min(int(request.hints["output_tokens"]), request.max_tokens)
            prepaid = declared if "declared" in self.predictor else 0
            output = self._final.get(request.id, max(prepaid, self._given[request.id]))
            expected[request.tenant] += SCALE * (request.num_prompt_tokens + 2 * output)
        assert self.queue.counters == expected
        self.num_reports += 1

    @property
    def predictor(self) -> str:
        return type(self.queue._predictor).__name__.lower()


@pytest.mark.parametrize("queue", ["vtc,lift=off", "vtc,lift=off,predictor=declared"])
@settings(max_examples=20, deadline=None)
@given(jobs(cancels=True), st.sampled_from(SCHEDULERS), st.sampled_from([24, 400]), st.sampled_from([0, 1]))
def test_counters_are_what_a_walk_over_all_requests_comes_to_after_every_report(
    queue: str, work: list[Job], scheduler: str, num_blocks: int, lag: int
) -> None:
    drive = Audited(plain(num_blocks, lag=lag), queue, work, scheduler)
    assert drive.num_reports == sum(step.runs for step in drive.steps)
    assert not drive.queue._accounts
    assert not drive.queue._unsure
    assert not drive.queue._num_counted


def test_a_request_that_is_preempted_and_computed_again_pays_its_input_once() -> None:
    work = [Job(12, 40, tenant="ab"[i % 2]) for i in range(4)]
    drive = Watched(plain(26), "vtc,lift=off", work)
    assert sum(len(step.preempted) for step in drive.steps) > 0
    assert drive.queue.counters == {"a": 2 * (12 + 80) * SCALE, "b": 2 * (12 + 80) * SCALE}


def test_with_a_perfect_prediction_counters_end_where_those_without_one_do() -> None:
    work = [Job(5 + i % 7, 3 + i % 11, i, tenant="aab"[i % 3]) for i in range(40)]
    ends = [Watched(plain(), f"vtc,lift=off,predictor={name}", work).queue.counters for name in ("none", "oracle")]
    assert (
        ends[0]
        == ends[1]
        == {tenant: SCALE * sum(j.prompt + 2 * j.output for j in work if j.tenant == tenant) for tenant in "ab"}
    )


def test_a_perfect_prediction_is_charged_whole_at_admission_and_never_settled() -> None:
    """The oracle's charges are all positive: nothing is ever given back, and no decode is charged."""
    work = [Job(5, 9, i, tenant="ab"[i % 2]) for i in range(10)]

    class Listening(Watched):
        def _deliver(self, now: int) -> None:
            if "charge" not in vars(self.queue):
                self.amounts: list[int] = []
                own = self.queue.charge

                def charge(tenant: str, amount: int) -> None:
                    self.amounts.append(amount)
                    own(tenant, amount)

                self.queue.charge = charge
            super()._deliver(now)

    assert Listening(plain(), "vtc,predictor=oracle", work).amounts == [SCALE * (5 + 18)] * 10


def test_a_request_that_comes_back_unserved_costs_nothing_and_lifts_nobody() -> None:
    queue = registry.make("queue", "vtc")
    first, second = (Request(i, i, 10, 5, tenant=tenant) for i, tenant in enumerate("ab"))
    for request in (first, second):
        queue.push(request, 0)
    assert queue.pop(0) is first
    assert queue.counters["a"] == 10 * SCALE
    queue.charge("b", 3 * SCALE)
    queue.push(first, 0)
    assert queue.peek(0) is first
    assert queue.counters == {"a": 0, "b": 3 * SCALE}


def test_what_is_given_back_puts_a_tenant_ahead_again() -> None:
    queue = registry.make("queue", "vtc")
    for i, tenant in enumerate("ab"):
        queue.push(Request(i, i, 10, 5, tenant=tenant), 0)
    queue.charge("a", 5)
    queue.charge("b", 10)
    assert queue.peek(0).tenant == "a"
    queue.charge("b", -8)
    assert queue.peek(0).tenant == "b"


@pytest.mark.parametrize("lag", [0, 1])
def test_put_in_place_of_another_it_charges_what_is_given_from_then_on(lag: int) -> None:
    work = [Job(6 + i % 5, 10 + i % 9, i // 2, tenant="ab"[i % 2]) for i in range(24)]

    class Swapped(Watched):
        had: dict[int, int]

        def _deliver(self, now: int) -> None:
            super()._deliver(now)
            if self.plane.next_step == 12:
                self.had = {r.id: r.num_output_tokens for r in self.requests if r.first_scheduled_ns is not None}
                spec, policies = StackSpec().rebuilt({"queue": "vtc,lift=off"}, block_size=4)
                self.plane.change_policies(policies, {"queue": spec.queue}, now)

    drive = Swapped(plain(24, lag=lag), "fcfs", work)
    assert any(had > 0 for had in drive.had.values())
    assert sum(len(step.preempted) for step in drive.steps[:12]) > 0
    expected: Counter[str] = Counter()
    for request, job in zip(drive.requests, work, strict=True):
        had = drive.had.get(request.id)
        expected[job.tenant] += 2 * job.output + job.prompt if had is None else 2 * (job.output - had)
    assert drive.queue.counters == {tenant: SCALE * n for tenant, n in expected.items()}
    assert not drive.queue._accounts


def test_who_leaves_the_decode_group_before_a_step_that_runs_nothing_is_named_by_the_next_that_runs() -> None:
    """A step that runs nothing is not reported; its departures would be lost to whoever counts members."""
    desk = Desk(Limits(8, 4, 4, 32, 30))
    request = desk.submit(4)
    desk.run(Plan(chunks=[(request, 4)]))
    desk.run(Plan(decode_all=True))
    empty = desk.run(Plan(preempt=[(request, Mode.RECOMPUTE)]))
    assert not empty.runs
    assert empty.left == []
    assert desk.run(Plan(chunks=[(request, 6)])).left == [request]
    assert desk.run(Plan(decode_all=True)).left == []


# F1 to F4: what VTC promises


M = 160  # tokens of KV cache
LONGEST = 40
U = max(LONGEST, 2 * M)


class Bounded(Watched):
    worst = 0

    def look(self) -> None:
        counters = [self.queue.counters.get(tenant, 0) for tenant in self.queue._waiting]
        if counters:
            self.worst = max(self.worst, max(counters) - min(counters))


@settings(max_examples=25, deadline=None)
@given(jobs("abcd"), st.sampled_from(["mixed", "sarathi,chunk_size=24", "prefill_first"]))
def test_counters_of_those_who_wait_differ_by_at_most_u(work: list[Job], scheduler: str) -> None:
    drive = Bounded(plain(M // 4), "vtc", work, scheduler, admission="reserve_max")
    assert drive.worst <= U * SCALE
    for one, other in ("ab", "ac", "bd", "cd"):
        assert drive.largest_difference(one, other) <= 2 * U


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


def test_service_of_two_who_always_wait_differs_by_at_most_two_u() -> None:
    drive = Bounded(plain(M // 4), "vtc", interleaved(flood()), admission="reserve_max")
    assert drive.worst <= U * SCALE
    assert max(drive.largest_difference(*pair) for pair in ("ab", "bc", "ac")) <= 2 * U


def test_first_come_first_served_gives_a_flood_more_than_two_u_over_the_others() -> None:
    drive = Watched(plain(M // 4), "fcfs", interleaved(flood()), admission="reserve_max")
    assert drive.largest_difference("a", "b") > 3 * 2 * U


def test_without_the_lift_who_comes_late_gets_more_than_two_u_over_who_was_served_before() -> None:
    work = [*(Job(20, 20, tenant="a") for _ in range(100)), *(Job(20, 20, 250, tenant="b") for _ in range(60))]
    found = {}
    for lift in ("on", "queued", "off"):
        drive = Watched(plain(M // 4), f"vtc,lift={lift}", work, admission="reserve_max")
        found[lift] = drive.largest_difference("a", "b")
    assert found["on"] == found["queued"] <= 2 * U < found["off"]


@pytest.mark.parametrize("queue", ["vtc", "drr", "dlpm", "fcfs", "las"])
def test_no_queue_that_stops_nobody_and_never_idles_keeps_the_difference_under_the_worth_of_a_whole_memory(
    queue: str,
) -> None:
    """Oracle F2, the lower bound: while one request of a tenant fills the memory to its end, whoever else comes waits.

    It is given M - 1 tokens in all, of which the first before the other has come."""
    work = [Job(1, M - 1, tenant="a"), Job(1, M - 1, 1, tenant="a"), Job(1, M - 1, 1, tenant="b")]
    drive = Watched(plain(M // 4), queue, work, admission="reserve_max")
    assert {"a", "b"} <= drive.waits[1]
    assert drive.largest_difference("a", "b") >= 2 * (M - 2) > 0.98 * 2 * M
    if queue == "vtc":
        assert drive.largest_difference("a", "b") <= 2 * U


@pytest.mark.parametrize(("lift", "least", "most"), [("on", 0.45, 0.55), ("queued", 0.97, 1.0), ("off", 0.97, 1.0)])
def test_a_burst_after_idleness_claims_no_more_than_its_share(lift: str, least: float, most: float) -> None:
    """One tenant keeps the replica lightly loaded, so that its queue is empty again and again; then another comes.

    As published, the code lifts only to who is queued: the newcomer finds all queues empty, starts from 0
    and takes nearly all. With the paper's rule, to the last who left, both get the same.
    """
    light = [Job(100, 20, 20 * i, tenant="a") for i in range(150)]
    burst = [Job(50, 50, 3_000, tenant="b") for _ in range(60)]
    rest = [Job(50, 50, 3_001, tenant="ab"[i % 2]) for i in range(120)]
    drive = Watched(Limits(500, 4, 8, 256, 400, prefix_caching=False), f"vtc,lift={lift}", [*light, *burst, *rest])
    got = drive.service(3_001, 3_501)
    assert {"a", "b"} <= drive.waits[3_500]
    assert least <= got["b"] / got.total() <= most, got


def test_service_is_in_proportion_to_weights() -> None:
    work = [Job(10, 10, tenant="abc"[i % 3]) for i in range(540)]
    drive = Watched(plain(M // 4), "vtc,weights=a:4;b:2", work, admission="reserve_max")
    got = drive.service(0, 400)
    assert {"a", "b", "c"} <= drive.waits[399]
    assert abs(got["a"] / 4 - got["c"]) <= 2 * U
    assert abs(got["b"] / 2 - got["c"]) <= 2 * U
    assert got["a"] / got["c"] == pytest.approx(4, rel=0.1)
    assert got["b"] / got["c"] == pytest.approx(2, rel=0.1)


def waits_of(queue: str, num_flooding: int) -> list[int]:
    """How many steps each request of a modest tenant waits beside one that floods."""
    modest = [Job(10, 10, 16 * i, tenant="modest") for i in range(1, 8)]
    work = [*(Job(10, 10, tenant="flood") for _ in range(num_flooding)), *modest]
    drive = Watched(plain(M // 4), queue, work, admission="reserve_max")
    assert "flood" in drive.waits[7 * 16]
    waits = [(r.first_scheduled_ns or 0) - r.arrival_ns for r in drive.requests[num_flooding:]]
    return [wait // STEP_NS for wait in waits]


def test_a_tenant_below_its_share_waits_no_longer_the_more_others_ask_for() -> None:
    assert waits_of("vtc", 100) == waits_of("vtc", 200)
    assert max(waits_of("vtc", 200)) <= 12
    assert max(waits_of("fcfs", 200)) >= max(waits_of("fcfs", 100)) + 100


def test_a_rate_limit_wastes_what_a_fair_queue_uses() -> None:
    """One tenant alone on the replica: within its limit of 10 in 100 steps it leaves most of the capacity unused."""
    work = [Job(10, 10, tenant="a") for _ in range(60)]
    limited = Watched(plain(), "rpm,limit=10,window_s=0.0001", work)
    fair = Watched(plain(), "vtc", work)
    ends = [max(r.finish_ns or 0 for r in drive.requests) for drive in (fair, limited)]
    assert ends[0] <= 130 * STEP_NS
    assert ends[1] >= 500 * STEP_NS
    assert limited.service() == fair.service()


# Where they are first come, first served


def same(limits: Limits, work: list[Job], queue: str, scheduler: str) -> None:
    fair, fcfs = (Drive(limits, StackSpec(scheduler, name), work) for name in (queue, "fcfs"))
    assert decisions(fair) == decisions(fcfs)
    assert outcomes(fair) == outcomes(fcfs)


@pytest.mark.parametrize(
    "queue",
    [
        "vtc",
        "vtc,predictor=declared,weights=a:3",
        "vtc,lift=off",
        "drr",
        "drr,quantum=1",
        "dlpm",
        "dlpm,quantum=1",
        "rpm,limit=1000",
    ],
)
@settings(max_examples=8, deadline=None)
@given(jobs("a", cancels=True), st.sampled_from(SCHEDULERS), st.sampled_from([24, 400]), st.sampled_from([0, 1]))
def test_with_one_tenant_they_decide_as_first_come_first_served(
    queue: str, work: list[Job], scheduler: str, num_blocks: int, lag: int
) -> None:
    same(plain(num_blocks, lag=lag), work, queue, scheduler)


@settings(max_examples=8, deadline=None)
@given(jobs("bc"), st.sampled_from(SCHEDULERS), st.sampled_from([24, 400]))
def test_without_shared_prefixes_and_with_a_quantum_to_spare_longest_match_is_first_come_first_served(
    work: list[Job], scheduler: str, num_blocks: int
) -> None:
    """If every tenant is there when quanta are first given out."""
    work = [Job(3, 3, tenant="b"), Job(3, 3, tenant="c"), *work]
    same(plain(num_blocks), work, "dlpm,quantum=1000000000", scheduler)


# Deficit round robin


def admitted(queue: TenantQueue, requests: list[tuple[str, int]], count: int) -> str:
    """The tenants of the first admissions, where nothing is charged but input."""
    for i, (tenant, size) in enumerate(requests):
        queue.push(Request(i, i, size, 1, tenant=tenant), 0)
    return "".join(queue.pop(0).tenant for _ in range(count))


def test_deficit_round_robin_by_hand() -> None:
    """Quantum 500, requests of 600 (a) and 300 (b): a 500 -100 | b 500 200 -100 | a 400 -200 | b 400 100 -200 |
    a 300 -300 | b 300 0 | a 200 -400 | b 500 200 -100 | a 100 -500 | b 400 100 -200 | (a 0 passes) b 300 0 | a 500."""
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    order = admitted(queue, [("a", 600), ("b", 300)] * 12, 14)
    assert order == "abbabbababbabb"
    assert [queue.pop(0).tenant for _ in range(2)] == ["b", "a"]
    assert queue.deficits == {"a": -100 * SCALE, "b": 0}


def test_a_request_that_does_not_fit_keeps_its_tenants_turn_without_another_quantum() -> None:
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    for i, (tenant, size) in enumerate([("a", 100), ("a", 100), ("b", 100)]):
        queue.push(Request(i, i, size, 1, tenant=tenant), 0)
    queue.pop(0)
    assert [queue.peek(0).tenant for _ in range(5)] == ["a"] * 5
    assert queue.deficits["a"] == 400 * SCALE
    queue.charge("a", 400 * SCALE)  # its running request spends the rest
    assert queue.peek(0).tenant == "b"
    assert queue.deficits == {"a": 0, "b": 500 * SCALE}


def test_a_tenant_that_left_with_something_to_spend_gets_no_quantum_on_top_of_it() -> None:
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    for i in range(2):
        queue.push(Request(i, i, 100, 1, tenant="a"), 0)
        queue.pop(0)
    assert queue.deficits == {"a": 300 * SCALE}


class EveryRound(Drr):
    """One round after the other."""

    def _skip_rounds(self) -> None:
        """None is skipped."""


class EveryHead(Dlpm):
    """Looks at every tenant in turn."""

    def _first_open(self) -> Request | None:
        heads = [self.head(tenant) for tenant in self._waiting if self.deficits[tenant] > 0]
        return min((head for head in heads if head is not None), key=lambda head: head.key, default=None)


class EveryCounter(Vtc):
    """Looks at every tenant in turn."""

    def choose(self, now: int) -> Request | None:
        heads = [(self.counters.get(tenant, 0), self.head(tenant)) for tenant in self._waiting]
        return min(((c, h.key, h) for c, h in heads if h is not None), default=(0, (0, 0), None))[2]


@pytest.mark.parametrize(
    ("queue", "slow"),
    [
        ("drr,quantum=1", lambda: EveryRound(1)),
        ("drr,quantum=20", lambda: EveryRound(20)),
        ("dlpm,quantum=1", lambda: EveryHead(1)),
        ("dlpm,quantum=20", lambda: EveryHead(20)),
        ("vtc", EveryCounter),
        ("vtc,predictor=declared", lambda: EveryCounter(predictor="declared")),
    ],
)
@settings(max_examples=8, deadline=None)
@given(jobs("abcd", cancels=True), st.sampled_from([24, 400]), st.booleans())
def test_what_saves_time_changes_no_decision(
    queue: str, slow: Callable[[], TenantQueue], work: list[Job], num_blocks: int, caching: bool
) -> None:
    class Slow(Drive):
        def _deliver(self, now: int) -> None:
            if self.plane.next_step == 0:
                self.stack.scheduler.queue = slow()  # type: ignore[attr-defined]
            super()._deliver(now)

    for job in work:
        job.keys = tuple(block_keys([len(job.tenant)] * job.prompt, 4))
    limits = Limits(num_blocks, 4, 6, 32, 400, prefix_caching=caching)
    fast, reference = Drive(limits, StackSpec(queue=queue), work), Slow(limits, StackSpec(queue=queue), work)
    assert decisions(fast) == decisions(reference)
    assert outcomes(fast) == outcomes(reference)


@pytest.mark.parametrize("queue", ["drr,quantum=40", "dlpm,quantum=40"])
def test_deficits_keep_a_flood_within_two_quanta_more_than_counters_do(queue: str) -> None:
    drive = Watched(plain(M // 4), queue, interleaved(flood()), admission="reserve_max")
    assert max(drive.largest_difference(*pair) for pair in ("ab", "bc", "ac")) <= 2 * (U + 40)


# Deficit longest prefix match


def offer(queue: Any, hits: dict[int, int]) -> None:
    view = SimpleNamespace(
        running={}, num_blocks=1000, block_size=4, probe=lambda request: Hit(hits.get(request.id, 0))
    )
    queue.begin(SimpleNamespace(view=view, seqs_left=9), 0)


def test_the_longest_match_of_those_who_have_not_spent_their_quantum_goes_first() -> None:
    queue = registry.make("queue", "dlpm,quantum=50,output_weight=0")
    for i, tenant in enumerate("aaabbc"):
        queue.push(Request(i, i, 100, 1, tenant=tenant), 0)
    offer(queue, {1: 80, 2: 40, 3: 60, 4: 60})
    order = []
    for _ in range(6):
        order.append(queue.pop(0).id)
    # 1 (80 of a: 50 - 20 = 30 left), 3 (of b, 60, earlier than 4; 10 left), 4 (b: -30), 2 (a: 30 - 60 = -30),
    # 5 (c, without a hit: -50). Then all refill: a alone waits, and has 20.
    assert order == [1, 3, 4, 2, 5, 0]
    assert queue.deficits == {"a": (20 - 100) * SCALE, "b": 20 * SCALE, "c": 0}


def test_a_match_however_long_waits_while_its_tenant_has_spent_its_quantum() -> None:
    queue = registry.make("queue", "dlpm,quantum=15,output_weight=0")
    for i, tenant in enumerate("aabb"):
        queue.push(Request(i, i, 100, 1, tenant=tenant), 0)
    offer(queue, {0: 80, 1: 80, 2: 60})
    # 0 (a: 15 - 20 = -5), 2 (b: 15 - 40 = -25), one refill (a: 10, b: -10), 1 (a: -10), one more (a: 5, b: 5), 3
    assert [queue.pop(0).id for _ in range(4)] == [0, 2, 1, 3]
    assert queue.deficits == {"a": 5 * SCALE, "b": (5 - 100) * SCALE}


def test_only_the_first_of_each_tenant_are_looked_up() -> None:
    queue = registry.make("queue", "dlpm,window=4")
    looked: list[int] = []
    for i in range(40):
        queue.push(Request(i, i, 10, 1, tenant="ab"[i % 2]), 0)

    class Hits(dict):
        def get(self, key: int, default: int = 0) -> int:
            looked.append(key)
            return default

    offer(queue, Hits())
    queue.peek(0)
    assert looked == [0, 2, 1, 3]
    assert [queue.pop(0).id for _ in range(6)] == [0, 1, 2, 3, 4, 5]


def documents(tenant: str, count: int) -> list[Job]:
    """Requests about four documents, two to each in turn."""
    made = []
    for i in range(count):
        tokens = [ord(tenant) * 10 + i // 2 % 4] * 48 + [1000 + i] * 8
        made.append(Job(56, 4, tenant=tenant, keys=tuple(block_keys(tokens, 4))))
    return made


class Extending(Watched):
    """Input counts without what the cache had."""

    def num_input(self, request: Request) -> int:
        return request.num_prompt_tokens - request.num_cached_tokens


def test_longest_match_computes_less_than_counters_and_stays_within_its_bound() -> None:
    work = [job for pair in zip(documents("a", 40), documents("b", 40), strict=True) for job in pair]
    limits = Limits(M // 4, 4, 2, 64, 110)
    vtc, dlpm = (Extending(limits, queue, work, admission="reserve_max") for queue in ("vtc", "dlpm,quantum=200"))
    assert dlpm.service().total() < 0.9 * vtc.service().total()
    assert dlpm.largest_difference("a", "b") <= 2 * (U + 200)
    for tenant, spent in dlpm.service().items():
        quanta, left = divmod(dlpm.queue.deficits[tenant] + SCALE * spent, 200 * SCALE)
        assert quanta > 1
        assert left == 0, "what was given in all is whole quanta"


# Requests per minute


def arrive(queue: Any, *arrivals_s: float, tenant: str = "a", first_id: int = 0) -> list[Request]:
    made = [Request(first_id + i, round(at * 1e9), 5, 5, tenant=tenant) for i, at in enumerate(arrivals_s)]
    for request in reversed(made):
        queue.push(request, request.arrival_ns)
    return made


def begin(queue: Any, now_s: float) -> SimpleNamespace:
    said = SimpleNamespace(dropped=[], wakes=[], view=None)
    said.drop = lambda request, reason: said.dropped.append(request.id)
    said.wake_at = said.wakes.append
    queue.begin(said, round(now_s * 1e9))
    return said


def test_excess_requests_wait_until_the_window_has_room() -> None:
    queue = registry.make("queue", "rpm,limit=2")
    arrive(queue, 0, 1, 2, 3, 70)
    arrive(queue, 4, tenant="b", first_id=9)
    seconds = [10**9 * n for n in (0, 1, 4, 60, 61, 120)]
    for at, expected in zip(seconds, [0, 1, 9, 2, 3, 4], strict=True):
        assert begin(queue, (at - 1) / 1e9).wakes == [at]
        assert queue.peek(at - 1) is None
        assert queue.pop(at).id == expected
    assert begin(queue, 200).wakes == []


def test_or_are_shed_where_the_window_is_full_when_they_come() -> None:
    queue = registry.make("queue", "rpm,limit=2,excess=drop")
    arrive(queue, 0, 1, 2, 59.9, 60, 60.5, 61)
    assert begin(queue, 61).dropped == [2, 3, 5]
    assert [queue.pop(61 * 10**9).id for _ in range(4)] == [0, 1, 4, 6]
    assert begin(queue, 61).dropped == []


def test_shed_requests_end_as_dropped_and_the_others_with_their_tokens() -> None:
    work = [Job(5, 5, tenant="a") for _ in range(5)]
    drive = Watched(plain(), "rpm,limit=2,excess=drop", work)
    assert [drive.status(i) for i in range(5)] == ["length"] * 2 + ["dropped"] * 3


def test_who_has_run_is_not_held_again() -> None:
    work = [Job(12, 40, tenant="a") for _ in range(4)]
    drive = Watched(plain(26), "rpm,limit=4", work)
    assert sum(len(step.preempted) for step in drive.steps) > 0
    assert max(r.finish_ns or 0 for r in drive.requests) < 10**9


# Knobs


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("vtc,weights=a", "weights must read tenant:weight"),
        ("vtc,weights=a:0", "numbers above 0"),
        ("vtc,weights=a:1;a:2", "each tenant once"),
        ("vtc,input_weight=-1", "must be 0 or more"),
        ("vtc,input_weight=0,output_weight=0", "not both 0"),
        ("vtc,lift=maybe", "lift must be on, queued or off"),
        ("vtc,predictor=oracle", "needs output lengths known beforehand"),
        ("drr,quantum=-1", "quantum must be 0"),
        ("dlpm,window=0", "window at least 1"),
        ("rpm,limit=0", "limit must be at least 1"),
        ("rpm,excess=hold", "excess must be wait or drop"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(spec: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        registry.make("queue", spec)


def test_a_tenants_name_may_hold_a_colon() -> None:
    assert registry.make("queue", "vtc,weights=org:a:2;:3")._weights == {"org:a": 2.0, "": 3.0}


def test_only_with_an_oracle_is_it_clairvoyant() -> None:
    assert registry.make("queue", "vtc,predictor=oracle", oracle={}).clairvoyant
    assert not registry.make("queue", "vtc,predictor=moving_average").clairvoyant


def test_many_charges_and_departures_leave_no_pile_of_entries_behind() -> None:
    queue = registry.make("queue", "vtc")
    for i in range(4_000):
        queue.push(Request(i, i, 3, 3, tenant=f"{i % 7}"), i)
        if i % 3:
            queue.pop(i)
        queue.charge("3", -1)
    assert len(queue._heap) < 200
