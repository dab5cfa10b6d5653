"""What fair queues charge whom, against a walk over all requests, and where they are first come, first served."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.plan import Mode, Plan, Report
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from policies.tenant_queue import SCALE
from tests.policies.byhand import Desk
from tests.policies.fairness import SCHEDULERS, Watched, jobs, plain, same, sampled
from tests.policies.harness import Job


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
