"""The simulated panel as a whole: routing, determinism, refusals, lag, what a recorder gets."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import astuple, replace

import pytest

from policies.contract import Route, Scheduler, View
from policies.control_plane import PolicyStalled
from policies.plan import Plan, Report
from policies.records import REQUESTS, STEPS
from policies.registry import make
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import StepCost
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log


class HostAndDevice(ConstantCost):
    """Every step: 2 ms to prepare, 5 ms on the device, 1 ms to finish."""

    def cost(self, shape: object) -> StepCost:
        return StepCost(2_000_000, 5_000_000, 1_000_000)


def rows(log: Log) -> list[dict]:
    return [dict(zip(REQUESTS, row, strict=True)) for row in log.requests]


def simulate(
    requests: list[tuple[int, int, int]], limits: Limits, costs: ConstantCost | LinearCost, replicas: int = 1
) -> tuple[list[Request], Log, int]:
    """(arrival ns, prompt, output) requests under the mixed policy."""
    log = Log()
    router = make("router", "least_tokens") if replicas > 1 else None
    stacks = [StackSpec().build() for _ in range(replicas)]
    made = [Request(i, at, prompt, output) for i, (at, prompt, output) in enumerate(requests)]
    simulation = Simulation(limits, stacks, costs, router, recorder=log, check=True)
    end = simulation.run(Arrival(r, o) for r, (_, _, o) in zip(made, requests, strict=True))
    return made, log, end


def test_without_lag_a_step_takes_host_and_device_time_one_after_the_other() -> None:
    requests, _, _ = simulate([(0, 8, 4)], Limits(64, prefix_caching=False, lag=0), HostAndDevice(1))
    assert requests[0].first_token_ns == 7_000_000
    assert requests[0].finish_ns == 7_000_000 + 3 * 8_000_000


def test_with_lag_the_hosts_work_hides_behind_the_device() -> None:
    requests, _, _ = simulate([(0, 8, 4)], Limits(64, prefix_caching=False, lag=1), HostAndDevice(1))
    # Step 1 is prepared while step 0 runs, so the device goes from one to the next without a pause.
    assert requests[0].first_token_ns == 7_000_000
    assert requests[0].finish_ns == 7_000_000 + 3 * 5_000_000


def test_what_arrives_while_a_step_runs_is_in_the_next_one_if_that_is_planned_late() -> None:
    work = [(0, 8, 8), (4_000_000, 8, 1)]  # the second arrives while step 0 runs, from 2 to 7 ms
    at_once = Limits(64, prefix_caching=False, lag=1)
    (_, second), _, _ = simulate(work, at_once, HostAndDevice(1))
    assert second.first_token_ns == 17_000_000
    first, second = simulate(work, replace(at_once, plan_lead_ns=2_000_000), HostAndDevice(1))[0]
    assert second.first_token_ns == 12_000_000
    assert first.finish_ns == 7_000_000 + 7 * 5_000_000  # and the device still never waits
    work[1] = (14_000_000, 8, 1)  # while decodes alone run, from 12 to 17 ms: the step after them is planned already
    for limits in (at_once, replace(at_once, plan_lead_ns=2_000_000)):
        assert simulate(work, limits, HostAndDevice(1))[0][1].first_token_ns == 27_000_000


def test_with_lag_a_request_that_stops_before_its_cap_costs_one_discarded_token() -> None:
    log = Log()
    limits = Limits(64, prefix_caching=False, lag=1)
    simulation = Simulation(limits, [StackSpec().build()], ConstantCost(1_000_000), recorder=log, check=True)
    early, capped = Request(0, 0, 8, 50), Request(1, 10_000_000_000, 8, 5)
    simulation.run([Arrival(early, 5), Arrival(capped, 5)])
    assert (early.state, capped.state) == (State.STOPPED, State.LENGTH)
    decodes = [dict(zip(STEPS, row, strict=True))["num_decodes"] for row in log.steps]
    assert sum(decodes) == 4 + 1 + 4  # the one more was in flight when the end became known


def test_the_router_spreads_requests_over_replicas_and_hears_of_every_end() -> None:
    requests, log, _ = simulate([(0, 100, 5)] * 9, Limits(64, prefix_caching=False), LinearCost(1_000, 10, 1), 3)
    replicas = [row["replica"] for row in rows(log)]
    assert sorted(replicas) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(request.state is State.LENGTH for request in requests)


def test_a_request_that_could_never_fit_is_refused_and_the_others_are_served() -> None:
    requests, log, _ = simulate(
        [(0, 10, 5), (0, 100, 2000), (5, 3999, 5), (6, 5000, 1), (7, 10, 5)],
        Limits(16, max_model_len=4000, prefix_caching=False),
        ConstantCost(1_000),
    )
    assert [r.state for r in requests] == [State.LENGTH, State.REFUSED, State.REFUSED, State.REFUSED, State.LENGTH]
    errors = {row["request_id"]: row["error"] for row in rows(log) if row["status"] == "refused"}
    assert "132 KV blocks" in errors[1]
    assert "5000" in errors[3]
    assert "4000" in errors[3]


def test_the_same_arrivals_give_the_same_records() -> None:
    work = [(i * 300, 20 + 7 * i % 90, 1 + 13 * i % 50) for i in range(60)]
    runs = [simulate(work, Limits(20, max_num_seqs=6, max_num_batched_tokens=64), LinearCost(900, 70, 1)) for _ in "ab"]
    assert astuple(runs[0][1]) == astuple(runs[1][1])
    assert sum(r.num_preemptions for r in runs[0][0]) > 0


def test_a_run_cut_off_at_a_time_records_what_was_unfinished() -> None:
    log = Log()
    limits = Limits(64, prefix_caching=False)
    simulation = Simulation(limits, [StackSpec().build()], ConstantCost(1_000_000), recorder=log)
    simulation.run([Arrival(Request(0, 0, 8, 500), 500)], until_ns=20_000_000)
    assert [row["status"] for row in rows(log)] == ["unfinished"]


def test_several_replicas_without_a_router_are_an_error() -> None:
    with pytest.raises(ValueError, match="router"):
        Simulation(Limits(8), [StackSpec().build(), StackSpec().build()], ConstantCost(1))


class Alternating:
    """Sends every other request away, the others to the replicas in turn; notes the ends it is told of."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []

    def route(self, request: Request, keys: object, replicas: object, now: int) -> Route | None:
        return None if request.id % 2 else Route(request.id // 2 % 2)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self.ended.append((request.id, replica))


def test_a_router_hears_of_the_ends_of_those_that_it_routed_and_of_no_others() -> None:
    router, log = Alternating(), Log()
    stacks = [StackSpec().build(), StackSpec().build()]
    simulation = Simulation(Limits(64), stacks, ConstantCost(1_000_000), router, recorder=log, check=True)
    simulation.run([Arrival(Request(i, i, 8, 2), 2) for i in range(6)])
    assert sorted(router.ended) == [(0, 0), (2, 1), (4, 0)]
    assert {row["request_id"]: row["status"] for row in rows(log)} == {
        i: ("length", "refused")[i % 2] for i in range(6)
    }


@pytest.mark.parametrize("route", [Route(0, decode_replica=1), Route(0, kv_from=1)])
def test_a_route_that_would_move_kv_blocks_is_refused_with_a_reason(route: Route) -> None:
    router, log = Alternating(), Log()
    router.route = lambda *about: route if about[0].id else Route(0, decode_replica=0)  # type: ignore[method-assign]
    stacks = [StackSpec().build(), StackSpec().build()]
    simulation = Simulation(Limits(64), stacks, ConstantCost(1_000_000), router, recorder=log, check=True)
    simulation.run([Arrival(Request(i, 0, 8, 2), 2) for i in range(2)])
    assert {row["request_id"]: row["error"] for row in rows(log)} == {
        0: "",
        1: "no transfer of KV blocks between replicas",
    }


def test_a_route_to_a_replica_that_is_not_there_is_an_error_that_names_the_router() -> None:
    router = Alternating()
    router.route = lambda *about: Route(-1)  # type: ignore[method-assign]
    simulation = Simulation(Limits(64), [StackSpec().build()], ConstantCost(1), router)
    with pytest.raises(IndexError, match=r"Alternating\.route answered replica -1; there are 0 to 0"):
        simulation.run([Arrival(Request(0, 0, 8, 2), 2)])


class AlwaysWakes:
    """Wraps a scheduler that wants to be asked again every millisecond, as one that promotes periodically does."""

    def __init__(self, inner: Scheduler) -> None:
        self.add, self.remove, self.on_report, self._plan = inner.add, inner.remove, inner.on_report, inner.plan

    def plan(self, view: View, now: int) -> Plan:
        plan = self._plan(view, now)
        plan.wake_at = now + 1_000_000
        return plan


def test_a_policy_that_always_wants_to_be_woken_does_not_keep_an_empty_replica_awake() -> None:
    stack, log = StackSpec().build(), Log()
    stack.scheduler = AlwaysWakes(stack.scheduler)
    simulation = Simulation(Limits(64), [stack], ConstantCost(5_000_000), recorder=log, check=True)
    end = simulation.run([Arrival(Request(i, i * 10**9, 8, 2), 2) for i in range(3)])
    assert end == 2 * 10**9 + 2 * 5_000_000
    assert len(log.steps) < 20


class PinsForAWhile:
    """Wraps a scheduler and keeps what ends on the device for 50 ms."""

    def __init__(self, inner: Scheduler) -> None:
        self.add, self.remove, self._inner = inner.add, inner.remove, inner
        self.pins: list[tuple[Request, int]] = []

    def on_report(self, report: Report) -> None:
        self._inner.on_report(report)

    def plan(self, view: View, now: int) -> Plan:
        plan = self._inner.plan(view, now)
        plan.pin = [(request, now + 50_000_000) for request, _ in plan.chunks]
        return plan


def test_a_pin_ends_at_its_time_on_an_empty_replica_too() -> None:
    stack = StackSpec().build()
    stack.scheduler = PinsForAWhile(stack.scheduler)
    simulation = Simulation(Limits(64, prefix_caching=False), [stack], ConstantCost(5_000_000), check=True)
    free_at = {}
    times = (11_000_000, 49_000_000)

    def look() -> Generator[object, None, None]:
        for at in times:
            yield simulation.env.timeout(at - simulation.env.now)
            free_at[at] = simulation.replicas[0].num_free_blocks

    simulation.env.process(look())  # type: ignore[arg-type]
    simulation.run([Arrival(Request(0, 0, 40, 2), 2)])
    assert free_at == dict.fromkeys(times, 61)
    assert simulation.replicas[0].num_free_blocks == 64
    assert simulation.env.now == 50_000_000


class OneAtATime:
    """Drops what waits longest in a plan of its own, every third time; else serves one request."""

    def __init__(self) -> None:
        self.queue: list[Request] = []
        self.plans = 0

    def add(self, request: Request, now: int) -> None:
        self.queue.append(request)

    def remove(self, request: Request, now: int) -> None:
        self.queue = [r for r in self.queue if r is not request]

    def on_report(self, report: object) -> None:
        """Nothing to learn."""

    def plan(self, view: View, now: int) -> Plan:
        self.plans += 1
        if not self.queue or view.running:
            return Plan(decode_all=view.num_decoding > 0)
        head = self.queue.pop(0)
        if self.plans % 3 == 1:
            return Plan(drop=[(head, "shed")])
        return Plan(chunks=[(head, head.num_tokens)])


def test_a_policy_that_plans_nothing_to_run_is_asked_again_while_requests_wait() -> None:
    stack = StackSpec().build()
    stack.scheduler = OneAtATime()
    log = Log()
    simulation = Simulation(Limits(64, prefix_caching=False), [stack], ConstantCost(1_000), recorder=log, check=True)
    simulation.run([Arrival(Request(i, 0, 8, 1), 1) for i in range(5)])
    assert {row["status"] for row in rows(log)} == {"dropped", "length"}


def test_a_policy_that_never_plans_anything_is_an_error() -> None:
    stack = StackSpec().build()
    stack.scheduler = OneAtATime()
    stack.scheduler.plan = lambda view, now: Plan()  # type: ignore[method-assign]
    simulation = Simulation(Limits(64, prefix_caching=False), [stack], ConstantCost(1_000))
    with pytest.raises(PolicyStalled):
        simulation.run([Arrival(Request(0, 0, 8, 1), 1)])
