"""KV that moves between replicas: timelines by hand, and nobody and nothing lost, whatever happens to whom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import LATER, ClusterReplica, Move, Replica, Route
from policies.plan import Plan
from policies.random_stream import RandomStream
from policies.records import ALIVE, REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request, State
from policies.routers.llumnix import PAIRINGS, Llumnix
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.policies.byhand import Desk
from tests.policies.fleet import make_router
from tests.policies.harness import Log
from tests.policies.library import EVERY

AT_ONCE = LinkSpeed(math.inf, 1)


class To:
    """Every request as told: where it prefills, where it decodes, and who is moved when `rebalance` is asked."""

    rebalance_ns = 10_000_000_000

    def __init__(
        self,
        route: Route | dict[int, Route],
        moves: dict[int, list[tuple[int, int, int]]] | None = None,
        every: int = 0,
    ) -> None:
        self.routes = route
        self.moves = moves or {}
        self.rebalance_ns = every or self.rebalance_ns
        self.ended: list[tuple[int, int]] = []
        self.open = True
        self.pulls_to = 1

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route:
        return self.routes[request.id] if isinstance(self.routes, dict) else self.routes

    def pull(self, request: Request, replicas: Sequence[ClusterReplica], now: int) -> int | None:
        return self.pulls_to if self.open else None

    def rebalance(self, replicas: Sequence[ClusterReplica], now: int) -> list[Move]:
        alive = {r.id: r for replica in replicas for r in replica.decoding()}
        return [Move(alive[i], a, b) for i, a, b in self.moves.get(now, []) if i in alive]

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self.ended.append((request.id, replica))


def simulate(
    router: object,
    requests: Sequence[tuple[int, int, int]],
    link: LinkSpeed = AT_ONCE,
    costs: object = None,
    replicas: int = 2,
    keys: Sequence[Sequence[bytes]] | None = None,
    check: bool = True,
    **limits: int,
) -> tuple[list[Request], Log, Simulation]:
    """Serve (arrival, prompt, output) with 4-token blocks and steps of 1,000 ns unless told otherwise."""
    log = Log()
    stacks = [StackSpec().build(block_size=4) for _ in range(replicas)]
    simulation = Simulation(
        Limits(**{"num_blocks": 64, "block_size": 4, **limits}),
        stacks,
        costs or ConstantCost(1_000),  # type: ignore[arg-type]
        router,  # type: ignore[arg-type]
        link=link,
        recorder=log,
        check=check,
    )
    made = [Request(i, at, prompt, output) for i, (at, prompt, output) in enumerate(requests)]
    simulation.run(Arrival(request, request.max_tokens, keys[request.id] if keys else ()) for request in made)
    return made, log, simulation


def happened(log: Log, request_id: int) -> list[tuple[int, str, int]]:
    """(replica, what, tokens or blocks) of a request's KV."""
    kinds = ("export", "reserve", "hand_over", "take_in", "take_back", "unreserve", "lend", "borrow")
    return [(d[0], d[3], d[4]) for d in log.decisions if d[2] == request_id and d[3] in kinds]


def test_a_prefill_is_decoded_elsewhere_after_the_time_of_its_transfer() -> None:
    """Prefill 0 to 1,000 on replica 0. Three blocks of 100 bytes at a byte a nanosecond and 5 of latency: 1,305. Then
    three more tokens, a step each: 4,305."""
    [request], log, _ = simulate(To(Route(0, 1)), [(0, 10, 4)], LinkSpeed(1e9, 100, latency_ns=5))
    assert (request.first_token_ns, request.finish_ns) == (1_000, 4_305)
    assert happened(log, 0) == [
        (0, "export", 10),
        (1, "reserve", 3),
        (0, "hand_over", 0),
        (1, "take_in", 10),
    ]
    row = dict(zip(REQUESTS, log.requests[0], strict=True))
    assert (row["replica"], row["max_tokens"], row["output_tokens"], row["moves"]) == (1, 4, 4, [0, 1, 2, 1, 0])


def test_two_prefills_that_end_together_share_the_link_of_their_replica() -> None:
    """Both prefill 0 to 1,000 in one step. Blocks of 100 bytes: 3 and 1. The small one has its byte share until 1,200,
    the large one then has 200 left, alone until 1,400. Each runs in the replica's next step."""
    (large, small), _, _ = simulate(To(Route(0, 1)), [(0, 10, 2), (0, 3, 2)], LinkSpeed(1e9, 100))
    assert small.finish_ns == 1_200 + 1_000
    assert large.finish_ns == 2_200 + 1_000  # it came at 1,400, in the middle of a step


def test_prefills_go_on_while_earlier_ones_are_sent() -> None:
    requests, _, _ = simulate(To(Route(0, 1)), [(i, 16, 2) for i in range(3)], LinkSpeed(1e9, 1_000), max_num_seqs=1)
    assert [r.first_token_ns for r in requests] == [1_000, 2_000, 3_000]
    # 4,000 bytes each, from 1,000: 1,000 of the first go alone, then two share, then three.
    # 1,000: 4,000 | 2,000: 3,000, 4,000 | 3,000: 2,500, 3,500, 4,000 | and then three share:
    # 10,500: 1,000, 1,500 | 12,500: 500 | 13,000, which is in the middle of a step of replica 1.
    assert [r.finish_ns for r in requests] == [11_500, 13_500, 14_500]


def test_a_request_whose_first_token_is_its_last_goes_nowhere() -> None:
    [request], log, _ = simulate(To(Route(0, 1)), [(0, 10, 1)])
    assert request.finish_ns == 1_000
    assert happened(log, 0) == []


def test_the_decode_side_pulls_once_it_has_blocks_for_a_whole_prompt_and_the_prefill_side_holds_them() -> None:
    """8 blocks of 4. Each request has 16 tokens, and 5 blocks are reserved with that of its next one. So they decode
    one after another, and by 3,000 replica 0 is full of two finished prefills: the fourth starts when one is gone, at
    4,000."""
    requests, log, _ = simulate(To(Route(0, 1)), [(i, 16, 4) for i in range(4)], num_blocks=8)
    assert [r.first_token_ns for r in requests] == [1_000, 2_000, 3_000, 5_000]
    assert [r.finish_ns for r in requests] == [4_000, 7_000, 10_000, 13_000]
    assert all(
        [kind for _, kind, _ in happened(log, i)] == ["export", "reserve", "hand_over", "take_in"] for i in range(3)
    )


def test_blocks_that_the_decode_side_has_cached_are_not_sent() -> None:
    keys = [[b"a", b"b", b"c"], [b"a", b"b", b"d"]]
    _, log, _ = simulate(To(Route(0, 1)), [(0, 12, 3), (9_000, 12, 3)], keys=keys)
    assert (1, "reserve", 3) in happened(log, 0)
    assert (1, "reserve", 1) in happened(log, 1)


def test_replicas_that_wait_for_each_other_do_not_wait_for_ever() -> None:
    """Each holds a finished prefill for the other, and has no room for the other's."""
    requests, log, _ = simulate(To({0: Route(0, 1), 1: Route(1, 0)}), [(0, 20, 6), (0, 20, 6)], num_blocks=7)
    assert [r.num_output_tokens for r in requests] == [6, 6]
    assert (1, "take_back", 20) in happened(log, 1)  # the second, when it is done at 1,000 and neither has room
    assert requests[1].finish_ns == 6_000


def test_who_is_told_later_waits_until_the_router_names_a_replica() -> None:
    """Replica 1 serves somebody else. From 5,200 on the router would have it take the first; at 6,000 it looks, and
    plans a step before the KV is there, at the same instant: so the next two tokens are those of 8,000 and 9,000."""
    router = To({0: Route(0, LATER), 1: Route(1)})
    router.open = False
    stacks = [StackSpec().build(block_size=4) for _ in "ab"]
    simulation = Simulation(Limits(64, 4), stacks, ConstantCost(1_000), router, link=AT_ONCE, check=True)
    first, second = Request(0, 0, 8, 3), Request(1, 0, 8, 60)
    simulation.at(5_200, lambda: setattr(router, "open", True))
    simulation.run([Arrival(first, 3), Arrival(second, 60)])
    assert (first.first_token_ns, first.finish_ns) == (1_000, 9_000)


def test_a_prefill_that_nobody_takes_while_nothing_runs_goes_on_where_it_is() -> None:
    router = To(Route(0, LATER))
    router.open = False
    [request], log, _ = simulate(router, [(0, 8, 3)])
    assert happened(log, 0) == [(0, "export", 8), (0, "take_back", 8)]
    assert request.finish_ns == 3_000


def test_who_is_cancelled_while_it_waits_for_a_slot_to_go_on_in_is_recorded_as_alive_until_it_left() -> None:
    """No replica counts it among those alive from the plan on before which it left, as its KV had not come back into a
    slot: so the counts of the steps and the rows of the requests agree."""
    desk = Desk(Limits(40, 4, 1, 32, 100, prefix_caching=False))
    first = desk.submit(8)
    desk.run(Plan(chunks=[(first, 8)]))
    desk.run(Plan(decode_all=True))
    assert desk.plane.transfers.export(first, desk.now)
    second = desk.submit(8)
    desk.run(Plan(chunks=[(second, 8)]))
    desk.plane.transfers.take_back(first, desk.now)
    desk.run(Plan(decode_all=True))
    assert first.state is State.MOVING
    assert desk.plane.cancel(first.id, desk.now)
    row = dict(zip(REQUESTS, desk.log.requests[0], strict=True))
    columns = ("status", "before_step", "end_before_step", "moves", "finish_ns")
    assert [row[name] for name in columns] == ["cancelled", 0, 2, [], 40]
    counted = [sum(dict(zip(STEPS, step, strict=True))[name] for name in ALIVE) for step in desk.log.steps]
    assert counted == [1, 1, 1, 1], "the first, then the second"


def test_a_scheduler_hears_once_that_a_request_is_gone_also_if_it_is_cancelled_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(Limits(40, 4, 4, 32, 100, prefix_caching=False))
    request = desk.submit(6)
    desk.run(Plan(chunks=[(request, 6)]))
    removed: list[Request] = []
    monkeypatch.setattr(desk.scheduler, "remove", lambda request, now: removed.append(request))
    assert desk.plane.transfers.export(request, desk.now)
    assert removed == [request]
    assert desk.plane.cancel(request.id, desk.now)
    assert (removed, request.state) == ([request], State.CANCELLED)
    assert desk.plane.num_free_blocks == 40
    assert desk.plane.live_ids == []


def test_a_prefill_that_its_own_replica_pulls_stays_there() -> None:
    """Without being copied: it goes on at 1,000, though replica 1 works."""
    router = To({0: Route(0, LATER), 1: Route(1)})
    router.pulls_to = 0
    (request, _), log, _ = simulate(router, [(0, 8, 3), (0, 8, 9)], LinkSpeed(1e9, 1_000))
    assert happened(log, 0) == [(0, "export", 8), (0, "take_back", 8)]
    assert request.finish_ns == 3_000


def test_a_running_request_migrates_while_it_decodes_and_stands_still_for_the_last_block_only() -> None:
    """12 tokens of prompt, a step a microsecond, 4-token blocks of 2,000 bytes at a byte a nanosecond. The move starts
    at 10,000: 20 tokens are computed, and 5 full blocks copied until 20,000. Then 31 are, and 2 more blocks copied
    until 24,000, when 35 are: one more block, left for the last copy. The step that has just begun ends at 25,000; a
    full block and the begun one take until 29,000. So it has lost four microseconds."""
    router = To(Route(0), {10_000: [(0, 0, 1)]}, every=10_000)
    [moved], log, _ = simulate(router, [(0, 12, 40)], LinkSpeed(1e9, 2_000))
    assert [kind for _, kind, _ in happened(log, 0)] == ["reserve", "export", "hand_over", "take_in"]
    assert moved.finish_ns == 40_000 + 4_000
    stay = dict(zip(REQUESTS, log.requests[0], strict=True))["moves"]
    assert stay[:3] == [0, 1, 26]


@pytest.mark.parametrize(("num_blocks", "moves"), [(18, True), (17, False)])
def test_a_migration_needs_room_for_what_the_request_has(num_blocks: int, moves: bool) -> None:
    """At 10,000 the first has 21 tokens computed, 22 with the next one: 6 blocks. The second has 45, and holds 12."""
    router = To({0: Route(0), 1: Route(1)}, {10_000: [(0, 0, 1)]}, every=10_000)
    requests, log, _ = simulate(router, [(0, 12, 12), (0, 36, 12)], num_blocks=num_blocks)
    kinds = [kind for _, kind, _ in happened(log, 0)]
    assert kinds == (["reserve", "export", "hand_over", "take_in"] if moves else [])
    assert [r.num_output_tokens for r in requests] == [12, 12]


def test_a_prefix_is_fetched_from_another_replica_s_cache_and_not_computed_again() -> None:
    """A token takes 100 ns; a block of 4 takes 40 to send. The first request leaves 4 blocks on replica 0. The second
    has them sent to replica 1, from 10,000 to 10,160, and computes its last 4 tokens there until 10,560."""
    keys = [[b"a", b"b", b"c", b"d"], [b"a", b"b", b"c", b"d", b"e"]]
    router = To({0: Route(0), 1: Route(1, kv_from=0)})
    (_, second), log, _ = simulate(
        router, [(0, 16, 1), (10_000, 20, 1)], LinkSpeed(1e9, 40), LinearCost(0, 100), keys=keys
    )
    assert happened(log, 1) == [(1, "borrow", 4), (0, "lend", 4)]
    assert (second.num_cached_tokens, second.finish_ns) == (16, 10_560)


def test_a_prefix_that_has_no_room_is_computed() -> None:
    """The second holds 8 of replica 1's 9 blocks when the third comes for 4."""
    keys = [[b"a", b"b", b"c", b"d"], [], [b"a", b"b", b"c", b"d", b"e"]]
    router = To({0: Route(0), 1: Route(1), 2: Route(1, kv_from=0)})
    requests, log, _ = simulate(router, [(0, 16, 1), (2_000, 24, 9), (3_500, 20, 1)], num_blocks=9, keys=keys)
    assert happened(log, 2) == []
    assert requests[2].num_cached_tokens == 0


class Chaos:
    """Sends everybody anywhere by every way there is."""

    rebalance_ns = 2_500

    def __init__(self, seed: int) -> None:
        self._stream = RandomStream(seed, "chaos")
        self._pulls = 0

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route:
        ids = [r.id for r in replicas]

        def draw(k: int) -> int:
            return ids[int(self._stream.uniform(request.id, k) * len(ids))]

        way = self._stream.uniform(request.id, 9)
        decode = draw(1) if way < 0.5 else LATER if way < 0.8 else None
        return Route(draw(0), decode, draw(2) if self._stream.uniform(request.id, 8) < 0.5 else None)

    def pull(self, request: Request, replicas: Sequence[ClusterReplica], now: int) -> int | None:
        self._pulls += 1
        place = int(self._stream.uniform(request.id, 100 + self._pulls) * (len(replicas) + 1))
        return None if place == len(replicas) else replicas[place].id

    def rebalance(self, replicas: Sequence[ClusterReplica], now: int) -> list[Move]:
        decoding = [(r, replica.id) for replica in replicas for r in replica.decoding()]
        return [
            Move(r, at, replicas[int(self._stream.uniform(r.id, now) * len(replicas))].id) for r, at in decoding[:3]
        ]

    def on_end(self, request: Request, replica: int, now: int) -> None: ...


JOBS = st.lists(
    st.tuples(
        st.integers(0, 3_000),  # gap
        st.integers(1, 40),  # prompt
        st.integers(1, 24),  # output
        st.sampled_from("abc"),
        st.one_of(st.none(), st.none(), st.integers(0, 30_000)),  # cancelled so long after it came
    ),
    min_size=1,
    max_size=14,
)
WORLDS = st.tuples(
    st.integers(0, 1),  # lag
    st.sampled_from([math.inf, 1e9, 1e8]),  # bandwidth; blocks are 400 bytes
    st.sampled_from([18, 30, 200]),  # blocks
    st.booleans(),  # prefix caching
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 2)), max_size=2),  # failures
    st.integers(0, 5),  # seed
)


def high_thresholds(pairing: str) -> Llumnix:
    """Thresholds at which it moves many."""
    return Llumnix(0.0025, migrate_out=9, pairing=pairing, target_tokens=8, drain="1", drain_at_s=4e-5)


def chaos(
    jobs: Sequence[tuple], world: tuple, stack: StackSpec, router: str | Llumnix | None = None
) -> tuple[list[tuple], list[tuple]]:
    """Three replicas behind `Chaos`, or a router given or by name. The records."""
    lag, bandwidth, num_blocks, caching, failures, seed = world
    limits = Limits(num_blocks, 4, max_num_seqs=4, max_num_batched_tokens=32, prefix_caching=caching, lag=lag)
    at, arrivals = 0, []
    for i, (gap, prompt, output, prefix, _) in enumerate(jobs):
        at += gap
        keys = [f"{prefix}{k}".encode() for k in range(min(prompt, 20) // 4)]
        keys += [f"{i}/{k}".encode() for k in range(len(keys), (prompt + output) // 4)]
        request = Request(i, at, prompt, output + 2 * (i % 2), tenant=prefix, priority=i % 3 - 1)
        arrivals.append(Arrival(request, output, keys))
    log, link, costs = Log(), LinkSpeed(bandwidth, 400, 7), LinearCost(400, 20, 1)
    made: Any = (
        Chaos(seed)
        if router is None
        else router
        if isinstance(router, Llumnix)
        else (make_router(router, block_size=4, cost=costs, transfer=link, seed=seed))
    )
    open_routes = watch(made)
    stacks = [stack.build(block_size=4, oracle={i: job[2] for i, job in enumerate(jobs)}, future={}) for _ in range(3)]
    simulation = Simulation(limits, stacks, costs, made, link=link, recorder=log, check=True)
    for arrival, job in zip(arrivals, jobs, strict=True):
        if job[4] is not None:
            simulation.at(arrival.request.arrival_ns + job[4], lambda i=arrival.request.id: simulation.cancel(i))
    for when, replica in failures:
        simulation.at(when, lambda replica=replica: simulation.fail(replica))
    if seed % 2:  # a link is down for a while, or for good
        simulation.at(4_000 * seed, lambda: simulation.cut_link(seed % 3))
        if seed != 3:
            simulation.at(9_000 * seed, lambda: simulation.mend_link(seed % 3))
    simulation.run(arrivals)
    assert not any(open_routes.values()), "the router was not told of every end"
    for replica in simulation.replicas:
        plane = replica.plane
        assert plane.num_live == 0
        assert not plane.transfers.underway
        held = plane.view.num_blocks - plane.num_free_blocks
        assert held == 0, f"{held} blocks are held for nobody"
    return log.requests, log.decisions


def watch(router: Any) -> Counter[int]:
    """By request id, the routes that the router has given and not been told the end of."""
    open_routes, route, on_end = Counter[int](), router.route, router.on_end

    def routed(request: Request, *more: Any) -> Route | None:
        answer = route(request, *more)
        open_routes[request.id] += answer is not None
        return answer  # type: ignore[no-any-return]

    def ended(request: Request, *more: Any) -> None:
        open_routes[request.id] -= 1
        on_end(request, *more)

    router.route, router.on_end = routed, ended
    return open_routes


def check_rows(jobs: Sequence[tuple], rows: Sequence[tuple], may_fail: bool) -> None:
    """Each request ends once, and if nobody interfered with all of its tokens, each by a step of its own."""
    ended = [dict(zip(REQUESTS, row, strict=True)) for row in rows]
    assert sorted(row["request_id"] for row in ended) == list(range(len(jobs)))
    for row in ended:
        job = jobs[row["request_id"]]
        if job[4] is None and not may_fail:
            assert row["status"] in ("stop", "length"), row
            assert row["output_tokens"] == job[2]
            runs = row["decode_runs"]
            made = len(row["token_steps"]) + sum(b - a for a, b in zip(runs[::2], runs[1::2], strict=True))
            assert made >= job[2]
        assert len(row["moves"]) % 5 == 0


@settings(max_examples=20, deadline=None)
@given(JOBS, WORLDS)
def test_whatever_moves_fails_or_is_cancelled_every_request_ends_once_and_every_block_comes_back(
    jobs: list, world: tuple
) -> None:
    rows, decisions = chaos(jobs, world, StackSpec())
    check_rows(jobs, rows, bool(world[4]))
    assert chaos(jobs, world, StackSpec()) == (rows, decisions)


@settings(max_examples=12, deadline=None)
@given(JOBS, WORLDS, st.sampled_from(PAIRINGS))
def test_whatever_llumnix_moves_every_request_ends_once_and_it_forgets_them_all(
    jobs: list, world: tuple, pairing: str
) -> None:
    router = high_thresholds(pairing)
    rows, decisions = chaos(jobs, world, StackSpec(queue="priority"), router)
    check_rows(jobs, rows, bool(world[4]))
    assert not router._at
    assert not router._moving
    assert not router._requests
    assert not router._urgent
    assert chaos(jobs, world, StackSpec(queue="priority"), high_thresholds(pairing)) == (rows, decisions)


ROUTERS = [
    *(name for name in registry.names("router") if registry.moves_kv(registry.find("router", name))),
    "distserve,prefill=2,waiting=1",
    "splitwise,prefill=2,max_pending_tokens=20",
    "mooncake,prefill=2,threshold=1",
]


@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=8, deadline=None)
@given(JOBS, WORLDS)
def test_every_router_that_moves_kv_bears_failures_cancellations_and_little_memory(
    router: str, jobs: list, world: tuple
) -> None:
    rows, decisions = chaos(jobs, world, StackSpec(), router)
    check_rows(jobs, rows, bool(world[4]))
    assert chaos(jobs, world, StackSpec(), router) == (rows, decisions)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([stack for stack in EVERY if stack.eviction != "belady"]), JOBS, WORLDS)
def test_every_policy_bears_requests_that_come_with_their_kv_and_leave_with_it(
    stack: StackSpec, jobs: list, world: tuple
) -> None:
    rows, _ = chaos(jobs, world, stack)
    assert sorted(row[0] for row in rows) == list(range(len(jobs)))
