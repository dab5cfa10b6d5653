"""Pools of different replicas behind one router, and replicas that come and go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Replica, Route
from policies.costing import decode_ns
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.cluster import Cluster, Pool
from simulator.costs.base import CostModel
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.policies.fleet import Loaded, PerToken, make_router
from tests.policies.harness import Log

MS = 1_000_000
LIMITS = Limits(40, 4, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=96, prefix_caching=False)


class Wants:
    """An autoscaler that wants what it is told to want, call by call; from the last one on, that."""

    def __init__(self, *sizes: int, every_ns: int = 10 * MS) -> None:
        self.every_ns = every_ns
        self.sizes = list(sizes)
        self.seen: list[tuple[list[int], int, int]] = []

    def scale(self, replicas: Sequence[Replica], num_starting: int, now: int) -> int:
        self.seen.append(([replica.id for replica in replicas], num_starting, now))
        return self.sizes[min(len(self.seen), len(self.sizes)) - 1]

    def on_end(self, request: Request, replica: int, now: int) -> None: ...


def pool(costs: CostModel, num: int = 1, *, limits: Limits = LIMITS, **more: Any) -> Pool:
    return Pool(limits, costs, lambda: StackSpec().build(block_size=limits.block_size), num, **more)


def run(
    pools: Sequence[Pool],
    jobs: Sequence[tuple[int, int, int]],
    router: str = "round_robin",
    plan: Callable[[Cluster], None] = lambda cluster: None,
    until_ns: int | None = None,
) -> tuple[list[Request], list[dict], list[tuple[int, int, str]]]:
    """Serve (arrival in ms, prompt, output)s. The requests, their rows in order of id, and (ms, replica, event)s."""
    log, events = Log(), []
    cluster = Cluster(
        pools,
        make_router(router, block_size=4),
        recorder=log,
        check=True,
        on_change=lambda at, replica, name, what: events.append((at // MS, replica, what)),
    )
    requests = [Request(i, at * MS, prompt, output) for i, (at, prompt, output) in enumerate(jobs)]
    plan(cluster)
    cluster.run([Arrival(r, r.max_tokens) for r in requests], until_ns)
    rows = sorted((dict(zip(REQUESTS, row, strict=True)) for row in log.requests), key=lambda row: row["request_id"])
    assert [row["request_id"] for row in rows] == list(range(len(jobs)))  # everybody once
    return requests, rows, events


# Pools


def test_each_pool_has_its_own_speed_and_its_own_limits() -> None:
    one_at_a_time = Limits(40, 4, max_num_seqs=1, max_model_len=96, prefix_caching=False)
    pools = [pool(ConstantCost(MS)), pool(ConstantCost(3 * MS), limits=one_at_a_time)]
    requests, rows, events = run(pools, [(0, 4, 5)] * 4)
    assert [row["replica"] for row in rows] == [0, 1, 0, 1]
    assert [(r.finish_ns or 0) // MS for r in requests] == [5, 15, 5, 30]
    assert events == [(0, 0, "serve"), (0, 1, "serve")]


def test_one_pool_is_the_simulation_without_pools() -> None:
    logs = Log(), Log()
    arrivals = [[Arrival(Request(i, i * 1_500_000, 9, 7 + i % 5), 7 + i % 5) for i in range(30)] for _ in logs]
    make = [registry.make("router", "power_of_two", seed=3) for _ in logs]
    Cluster([pool(LinearCost(MS, 100), 3)], make[0], recorder=logs[0]).run(arrivals[0])
    stacks = [StackSpec().build(block_size=4) for _ in range(3)]
    Simulation(LIMITS, stacks, LinearCost(MS, 100), make[1], recorder=logs[1]).run(arrivals[1])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("decode_first", [False, True])
def test_a_router_that_moves_kv_prefills_and_decodes_where_pools_say_so(decode_first: bool) -> None:
    link = LinkSpeed(math.inf, 1)
    roles = [
        pool(ConstantCost(2 * MS), name="p", role="prefill", link=link),
        pool(ConstantCost(MS), name="d", role="decode", link=link),
    ]
    requests, rows, _ = run(roles[::-1] if decode_first else roles, [(0, 4, 5), (0, 4, 5), (20, 4, 5)], "disaggregated")
    assert {row["replica"] for row in rows} == {0 if decode_first else 1}
    assert [(r.first_token_ns or 0) // MS for r in requests] == [2, 2, 22]
    assert [(r.finish_ns or 0) // MS for r in requests] == [6, 6, 26]


def test_a_request_is_offered_only_replicas_that_could_hold_it() -> None:
    small = Limits(40, 4, max_num_seqs=2, max_model_len=16, prefix_caching=False)
    pools = [pool(ConstantCost(MS), 2, limits=small), pool(ConstantCost(MS))]
    _, rows, _ = run(pools, [(i, 40 if i % 2 else 8, 3) for i in range(6)] + [(9, 200, 3)])
    assert [row["replica"] for row in rows[:6]][1::2] == [2, 2, 2]
    assert [row["status"] for row in rows] == ["length"] * 6 + ["refused"]


def test_blocks_of_two_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match="one size"):
        Cluster([pool(ConstantCost(1)), pool(ConstantCost(1), limits=Limits(40, 8))], make_router("round_robin"))


# Replicas that come and go


def test_a_replica_that_is_asked_for_takes_requests_once_it_has_started() -> None:
    wants = Wants(2)
    pools = [pool(ConstantCost(MS), autoscaler=wants, cold_start_ns=25 * MS)]
    _, rows, events = run(pools, [(at, 4, 2) for at in range(0, 60, 4)])
    assert events == [(0, 0, "serve"), (10, 1, "start"), (35, 1, "serve")]
    assert [row["replica"] for row in rows] == [0] * 9 + [1, 0, 1, 0, 1, 0]
    assert wants.seen[:4] == [([0], 0, 10 * MS), ([0], 1, 20 * MS), ([0], 1, 30 * MS), ([0, 1], 0, 40 * MS)]


def test_a_replica_too_many_finishes_what_it_has_and_takes_nothing_new() -> None:
    pools = [pool(ConstantCost(MS), 2, autoscaler=Wants(1))]
    requests, rows, events = run(pools, [(0, 4, 40), (0, 4, 30), (1, 4, 35)] + [(20, 4, 3)] * 4)
    assert events == [(0, 0, "serve"), (0, 1, "serve"), (10, 1, "drain"), (30, 1, "stop")]
    assert [row["replica"] for row in rows] == [0, 1, 0] + [0] * 4
    assert {row["status"] for row in rows} == {"length"}
    assert requests[1].finish_ns == 30 * MS


def test_what_starts_goes_first_and_an_idle_one_at_once_and_the_last_one_never() -> None:
    pools = [pool(ConstantCost(MS), 2, autoscaler=Wants(4, 3, 0), cold_start_ns=15 * MS)]
    _, _, events = run(pools, [(0, 4, 60)])
    assert events[2:] == [(10, 2, "start"), (10, 3, "start"), (20, 3, "stop"), (25, 2, "serve"),
                          (30, 2, "drain"), (30, 1, "drain"), (30, 1, "stop"), (30, 2, "stop")]  # fmt: skip


def test_a_failed_replica_is_replaced_and_who_comes_meanwhile_waits_for_the_next() -> None:
    pools = [pool(ConstantCost(MS), autoscaler=Wants(1), cold_start_ns=20 * MS)]
    requests, rows, events = run(
        pools, [(0, 4, 50), (7, 4, 3), (14, 4, 3)], plan=lambda cluster: cluster.at(5 * MS, lambda: cluster.fail(0))
    )  # the second comes before the autoscaler is asked, the third after that
    assert events == [(0, 0, "serve"), (5, 0, "fail"), (10, 1, "start"), (30, 1, "serve")]
    assert [(row["status"], row["replica"]) for row in rows] == [("cancelled", 0), ("length", 1), ("length", 1)]
    assert [r.finish_ns for r in requests[1:]] == [33 * MS, 33 * MS]


def test_an_autoscaler_is_told_the_time_of_an_end_also_where_a_replica_is_ahead_of_the_simulation() -> None:
    told: dict[bool, list[tuple[int, int]]] = {}
    for together in (True, False):
        scaler = Wants(2, every_ns=50 * MS)
        ends = told[together] = []
        scaler.on_end = lambda request, replica, now, ends=ends: ends.append((request.id, now))  # type: ignore[method-assign,misc]
        pools = [pool(ConstantCost(MS), 2, autoscaler=scaler)]
        cluster = Cluster(pools, make_router("round_robin", block_size=4), together=together)
        requests = [Request(i, i * 7 * MS, 4, 9 + i) for i in range(8)]
        cluster.run([Arrival(r, r.max_tokens) for r in requests])
        assert ends == [(r.id, r.finish_ns) for r in sorted(requests, key=lambda r: (r.finish_ns, r.id))]
    assert told[True] == told[False]


def test_who_waits_for_a_replica_may_go_away_or_be_there_at_the_end() -> None:
    def plan(cluster: Cluster) -> None:
        cluster.at(5 * MS, lambda: cluster.fail(0))
        cluster.at(15 * MS, lambda: cluster.cancel(1))

    pools = [pool(ConstantCost(MS), autoscaler=Wants(1), cold_start_ns=20 * MS)]
    _, rows, _ = run(pools, [(0, 4, 50), (12, 4, 3), (14, 4, 3)], plan=plan, until_ns=25 * MS)
    assert [row["status"] for row in rows] == ["cancelled", "cancelled", "unfinished"]


def test_who_goes_away_while_no_replica_is_left_was_not_lost_by_one() -> None:
    def plan(cluster: Cluster) -> None:
        cluster.at(5 * MS, lambda: cluster.fail(0))
        cluster.at(8 * MS, lambda: cluster.cancel(1))  # before the autoscaler is asked

    _, rows, _ = run([pool(ConstantCost(MS), autoscaler=Wants(1))], [(0, 4, 50), (7, 4, 3)], plan=plan)
    assert [(row["status"], row["error"]) for row in rows] == [
        ("cancelled", "the replica has failed"),
        ("cancelled", ""),
    ]


def test_without_an_autoscaler_nobody_waits_for_what_will_not_come() -> None:
    _, rows, _ = run([pool(ConstantCost(MS))], [(9, 4, 3)], plan=lambda c: c.at(5 * MS, lambda: c.fail(0)))
    assert [(row["status"], row["error"]) for row in rows] == [("refused", "every replica has failed")]


def test_who_waits_for_a_replica_that_dies_as_it_starts_is_served_by_the_next() -> None:
    pools = [pool(ConstantCost(MS), autoscaler=Wants(1), cold_start_ns=20 * MS)]

    def plan(cluster: Cluster) -> None:
        cluster.at(5 * MS, lambda: cluster.fail(0))
        cluster.at(15 * MS, lambda: cluster.fail(1))  # asked for at 10, when somebody has come for it

    _, rows, events = run(pools, [(0, 4, 50), (12, 4, 3), (22, 4, 3)], plan=plan)
    assert events == [
        (0, 0, "serve"),
        (5, 0, "fail"),
        (10, 1, "start"),
        (15, 1, "fail"),
        (20, 2, "start"),
        (40, 2, "serve"),
    ]
    assert [(row["status"], row["replica"]) for row in rows][2] == ("length", 2)


def test_an_autoscaler_without_a_router_is_an_error() -> None:
    with pytest.raises(ValueError, match="an autoscaler needs a router"):
        Cluster([pool(ConstantCost(MS), autoscaler=Wants(1))], None)


NEXT = {None: {"start", "serve"}, "start": {"serve", "stop", "fail"}, "serve": {"drain", "fail"},
        "drain": {"stop", "fail"}, "stop": set(), "fail": set()}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=25),
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=2, max_size=2),
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 5)), max_size=4),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 24)), max_size=4),
    st.sampled_from(["least_requests", "disaggregated", "distserve,waiting=1", "splitwise", "llumnix,every_ms=3"]),
)
def test_however_pools_change_every_request_ends_once_and_every_replica_has_one_life(
    jobs: list, sizes: list, cold: int, failures: list, cancelled: list, router: str
) -> None:
    link = LinkSpeed(1e6, 400, 7)
    roles = (
        ("prefill", "decode") if router.split(",")[0] in ("disaggregated", "distserve", "splitwise") else ("both",) * 2
    )
    pools = [
        pool(LinearCost(MS, 10_000), name=role + str(i), role=role, link=link, autoscaler=Wants(*each, every_ns=7 * MS),
             cold_start_ns=cold * MS)
        for i, (role, each) in enumerate(zip(roles, sizes, strict=True))
    ]  # fmt: skip

    def plan(cluster: Cluster) -> None:
        for at, replica in failures:
            cluster.at(at * MS, lambda r=replica: cluster.fail(r) if r < len(cluster.replicas) else None)
        for at, request in cancelled:
            cluster.at(at * MS, lambda r=request: cluster.cancel(r))

    _, rows, events = run(pools, sorted(jobs), router, plan)
    state: dict[int, str | None] = {}
    for _, replica, what in events:
        assert what in NEXT[state.get(replica)]
        state[replica] = what
    for row in rows:
        if row["status"] == "cancelled":
            assert row["request_id"] in [r for _, r in cancelled] or "fail" in state.values()
        else:
            assert row["status"] == "length"


class OnlyFast:
    """A router that goes by what each replica says of itself."""

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        assert {(r.pool, r.role, r.max_num_seqs) for r in replicas} == {("fast", "both", 2), ("slow", "both", 7)}
        return Route(min(replicas, key=lambda r: decode_ns(r.cost, 1, 10)).id)

    def on_end(self, request: Request, replica: int, now: int) -> None: ...


def test_a_router_sees_the_pool_the_role_the_slots_and_the_cost_of_each_replica() -> None:
    wide = Limits(40, 4, max_num_seqs=7, max_model_len=96, prefix_caching=False)
    pools = [pool(ConstantCost(2 * MS), limits=wide, name="slow"), pool(ConstantCost(MS), name="fast")]
    requests = [Request(i, 0, 4, 4) for i in range(3)]
    cluster = Cluster(pools, OnlyFast())
    cluster.run([Arrival(r, 4) for r in requests])
    assert [r.finish_ns for r in requests] == [4 * MS, 4 * MS, 8 * MS]


def test_the_shortest_expected_delay_minds_how_fast_replicas_are_and_among_equals_is_the_shortest_queue() -> None:
    jobs = [(at, 4, 12) for at in range(0, 240, 3)]
    equal = [pool(ConstantCost(MS), 3)]
    assert run(equal, jobs, "shortest_delay")[1] == run(equal, jobs, "least_requests")[1]
    wide = Limits(100, 4, max_num_seqs=8, max_model_len=96, prefix_caching=False)
    unequal = [
        pool(ConstantCost(5 * MS), 2, limits=wide, name="slow"),
        pool(ConstantCost(MS), limits=wide, name="fast"),
    ]
    took = {}
    for router in ("least_requests", "shortest_delay"):
        requests, rows, _ = run(unequal, jobs, router)
        took[router] = sum((r.finish_ns or 0) - r.arrival_ns for r in requests)
        assert [row["replica"] for row in rows[:2]] == ([2, 2] if router == "shortest_delay" else [0, 1])
    assert took["shortest_delay"] < 0.6 * took["least_requests"]


def test_the_speed_of_a_replica_is_that_of_a_full_batch_that_fills_half_its_memory() -> None:
    router = make_router("shortest_delay,tokens_per_seq=100", block_size=16)
    steps = PerToken(1_000, 10)  # ns a token, and a token of context
    assert router.ns_per_token(Loaded(0, num_blocks=100, max_num_seqs=4, cost=steps)) == 1_000 + 10 * 800 / 4
    assert router.ns_per_token(Loaded(0, num_blocks=100, max_num_seqs=64, cost=steps)) == 1_000 + 10 * 800 / 16
    assert router.ns_per_token(Loaded(0)) == 1
