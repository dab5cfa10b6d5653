"""Llumnix: freeness and virtual usage by hand, who is paired with whom, and which pairs move somebody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import registry
from policies.contract import Route
from policies.request import Request, State
from policies.routers.llumnix import PAIRINGS, Llumnix, Load
from tests.policies.fleet import Loaded


@dataclass
class Decodes(Loaded):
    """A replica of 100 blocks of 16 tokens on which these requests decode."""

    requests: list[Request] = field(default_factory=list)
    num_incoming_blocks: int = 0

    def decoding(self) -> Iterator[Request]:
        return iter(self.requests)


def decodes(id: int, blocks: int, priority: int = 0) -> Request:
    """A request that has its first token and as many full blocks, less that token."""
    request = Request(id, id, 16 * blocks - 1, 64, priority=priority)
    request.state = State.RUNNING
    request._computed = request._tokens
    request._tokens += 1
    return request


def replica(id: int, *blocks: int, first: int = 0, priority: int = 0) -> Decodes:
    """One on which requests of so many blocks decode, with ids from `first`."""
    requests = [decodes(first + i, many, priority) for i, many in enumerate(blocks)]
    return Decodes(id, num_running=len(blocks), num_free_blocks=100 - sum(blocks), requests=requests)


def moves(router: Llumnix, *replicas: Decodes) -> list[tuple[int, int, int]]:
    return [(move.request.id, move.source, move.target) for move in router.rebalance(replicas, 0)]


def route(router: Llumnix, request: Request, *replicas: Decodes) -> int:
    made = router.route(request, [], replicas, 0)
    assert made is not None
    return made.replica


def test_freeness_is_free_blocks_a_request() -> None:
    """The worked figures: 100 blocks, 70 in use by 3 requests; with a queue's head of 40 that is one request more."""
    assert Load(100, 70, 0, 3).freeness == 10
    assert Load(100, 70, 40, 4).freeness == -2.5
    assert Load(100, 0, 0, 0).freeness == math.inf
    assert Load(100, 0, 0, 0, draining=True).freeness == -math.inf


def test_a_request_of_high_priority_counts_as_all_memory_but_the_target() -> None:
    """1,600 tokens are 100 blocks of 16; of 850 blocks 750 are headroom, however many share it."""
    router = Llumnix()
    big = Decodes(0, num_blocks=850, num_free_blocks=800, num_running=2)
    assert router.dispatch_load(big).freeness == 400
    urgent = decodes(7, 20, priority=-1)
    route(router, urgent, big)
    assert router.dispatch_load(big).freeness == (850 - 50 - 750) / 2
    another = decodes(8, 20, priority=-2)
    route(router, another, big)
    assert router.dispatch_load(big).freeness == 25
    for request in (urgent, another):
        router.on_end(request, 0, 0)
    assert router.dispatch_load(big).freeness == 400


def test_a_request_of_high_priority_has_no_headroom_while_it_is_queued() -> None:
    router = Llumnix()
    big = Decodes(0, num_blocks=850, num_free_blocks=800, num_running=2)
    route(router, Request(7, 7, 160, 8, priority=-1), big)
    assert router.dispatch_load(big).virtual_usage == 50


def test_an_arrival_sees_all_that_is_queued_and_migration_only_the_head() -> None:
    """Queued: 33 tokens (3 blocks), 160 (10), and 16 of the highest priority, which so are the head: 1 block."""
    router = Llumnix(high=-9)
    here = Decodes(0, num_free_blocks=40, num_running=4)
    for id, tokens, priority in ((1, 33, 0), (2, 160, 0), (3, 16, -1)):
        route(router, Request(id, id, tokens, 8, priority=priority), here)
    here.num_waiting, here.num_prefill_tokens = 3, 209
    assert router.dispatch_load(here) == Load(100, 60, 14, 7)
    assert router.migration_load(here) == Load(100, 60, 1, 5)
    router.on_end(Request(3, 3, 16, 8), 0, 0)
    assert router.migration_load(here).queued == 3


def test_an_arrival_goes_to_the_freest_replica_and_of_equal_ones_to_the_first() -> None:
    router = Llumnix()
    few, many = replica(0, 50), replica(1, 10, 10, 10, first=10)  # 50 a request; 70 / 3
    assert route(router, Request(90, 90, 16, 8), many, few) == 0
    assert route(router, Request(91, 91, 16, 8), replica(1, 50), replica(0, 50)) == 0
    assert route(router, Request(92, 92, 16, 8), few, Decodes(2), Decodes(3)) == 2


def test_the_least_free_is_paired_with_the_freest_the_second_with_the_second() -> None:
    """Freeness 2, 1, 10, 40, and exactly 3, which is neither a source nor a target."""
    fleet = [
        replica(0, *[9] * 10, first=0),  # 10 / 10 = 1, below
        replica(1, 96, 2, first=20),  # 2 / 2 = 1
        replica(2, 30, 30, 20, first=30),  # 20 / 3 = 6.7
        replica(3, 60, first=40),  # 40
        replica(4, 47, 47, first=50),  # 6 / 2 = 3
    ]
    assert moves(Llumnix(), *fleet) == [(0, 0, 3), (21, 1, 2)]
    assert moves(Llumnix(), *reversed(fleet)) == [(0, 0, 3), (21, 1, 2)]
    assert moves(Llumnix(migrate=False), *fleet) == []


def test_of_the_lowest_priority_the_shortest_is_moved() -> None:
    source = replica(0, 30, 20, 28, 20, first=0)
    source.requests[1].priority, source.requests[2].priority = -1, 5
    assert moves(Llumnix(), source, Decodes(1)) == [(2, 0, 1)]
    source.requests[2].priority = 0
    assert moves(Llumnix(), source, Decodes(1)) == [(3, 0, 1)]


def test_a_replica_that_still_sends_one_sends_no_other_until_that_has_come_or_stays() -> None:
    source, target = replica(0, 32, 33, 34), replica(1, 40, first=10)
    router = Llumnix()
    first, *rest = source.requests
    for request in source.requests:
        route(router, request, Decodes(0))
    assert moves(router, source, target) == [(0, 0, 1)]
    source.requests = rest  # it moves: no replica lists it
    assert moves(router, source, target) == []
    first.state = State.MOVING
    assert moves(router, source, target) == []
    source.requests = [first, *rest]  # it has stayed
    first.state = State.RUNNING
    assert moves(router, source, target) == [(0, 0, 1)]
    source.requests, first.state = rest, State.WAITING  # preempted on its way
    assert moves(router, source, target) == [(1, 0, 1)]


def test_a_request_that_has_moved_counts_where_it_is() -> None:
    router = Llumnix(target_tokens=160)
    source, target = replica(0, 32, 32, 33, priority=-1), replica(1)
    for request in source.requests:
        route(router, request, Decodes(0))
    target.requests.append(source.requests.pop(0))
    moves(router, source, target)
    assert (router.migration_load(source).urgent, router.migration_load(target).urgent) == (2, 1)


@pytest.mark.parametrize(
    ("pairing", "source", "target", "moved"),
    [
        # 98 of 100 used by 2: 1. The target: 40 by 1, 60. After: 66 by 1, 34; and 72 by 2, 14.
        ("guarded", (32, 66), (40,), True),
        ("balanced", (32, 66), (40,), False),  # the source would be freer than the target
        ("defrag", (32, 66), (40,), True),
        # 95 used by 5 of 19: 1. The target: 60 by 4, 10. After: 76 by 4, 6; and 79 by 5, 4.2.
        ("guarded", (19,) * 5, (15,) * 4, True),
        ("balanced", (19,) * 5, (15,) * 4, False),
        # 96 used by 12 of 8: 0.33. The target: 40 by 2, 30. After: 88 by 11, 1.1; and 48 by 3, 17.3.
        ("guarded", (8,) * 12, (20, 20), True),
        ("balanced", (8,) * 12, (20, 20), True),
        # One alone that grows too large is no better off elsewhere.
        ("guarded", (98,), (), False),
        ("balanced", (98,), (), False),
        ("defrag", (98,), (), True),
        # 49 do not fit into 40.
        ("defrag", (49, 49), (30, 30), False),
        # 32 fit into 35, and leave 3 for 3 requests.
        ("guarded", (32, 66), (33, 32), False),
        ("balanced", (32, 66), (33, 32), False),
        ("defrag", (32, 66), (33, 32), True),
    ],
)
def test_a_pair_moves_somebody_where_its_rule_allows(pairing: str, source: tuple, target: tuple, moved: bool) -> None:
    fleet = replica(0, *source), replica(1, *target, first=50)
    assert bool(moves(Llumnix(pairing=pairing), *fleet)) == moved


def test_a_queue_s_head_that_asks_for_more_than_there_is_makes_room_for_itself() -> None:
    """60 used by 3, a freeness of 13; with a head of 60 it is -5, and the shortest leaves: -1.7 after it, and 22.5
    there. All rules agree."""
    source, target = replica(0, 15, 20, 25), replica(1, 40, first=10)
    assert moves(Llumnix(), source, target) == []
    for rule in PAIRINGS:
        router = Llumnix(pairing=rule)
        route(router, Request(9, 9, 960, 8), Decodes(0))
        source.num_waiting = 1
        assert moves(router, source, target) == [(0, 0, 1)], rule


def test_small_requests_leave_one_by_one_for_a_large_one_although_freeness_falls_meanwhile() -> None:
    """98 used by 4; a head of 90 makes it (100 - 98 - 90) / 5 = -17.6, and -87 / 4 = -21.8 when one of 1 is gone."""
    source, target = replica(0, 1, 1, 48, 48), replica(1, 40, first=10)
    router = Llumnix()
    route(router, Request(9, 9, 90 * 16, 8), Decodes(0))
    source.num_waiting = 1
    assert router.migration_load(source).freeness == -17.6
    assert moves(router, source, target) == [(0, 0, 1)]


def test_a_replica_that_drains_gets_nothing_and_gives_everything() -> None:
    router = Llumnix()
    router.drain(0)
    source, target = replica(0, 5), replica(1, 40, 40, first=10)
    assert route(router, Request(9, 9, 16, 8), source, target) == 1
    assert moves(router, source, target) == [(0, 0, 1)]
    assert route(router, Request(8, 8, 16, 8), source) == 0, "somebody has to take it"


def test_it_drains_from_the_time_on_that_its_knob_says_and_not_under_a_new_life() -> None:
    router = Llumnix(drain="0", drain_at_s=2.0)
    fleet = Decodes(0), Decodes(1)
    request = Request(9, 9, 16, 8)
    assert router.route(request, [], fleet, 1_999_999_999) == Route(0)
    assert router.route(request, [], fleet, 2_000_000_000) == Route(1)
    assert router.route(request, [], fleet[1:], 2_000_000_001) == Route(1)  # it is gone
    assert router.route(request, [], fleet, 2_000_000_002) == Route(0)  # a fresh one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("llumnix,migrate_in=1", "migrate_in 1.0 is below migrate_out 3.0"),
        ("llumnix,every_ms=0", "every_ms must be at least a nanosecond"),
        ("llumnix,pairing=best", "pairing must be one of guarded, balanced, defrag"),
        ("llumnix,drain=a", "drain must be ids of replicas"),
        ("llumnix,target_tokens=-1", "target_tokens and drain_at_s must be at least 0"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(registry.PolicyError, match=says):
        registry.make("router", text, block_size=16)


SIZES = st.lists(st.integers(1, 30), max_size=12)


@given(SIZES, SIZES, SIZES, st.sampled_from(["guarded", "balanced"]))
def test_at_steady_load_no_request_ever_comes_back(a: list, b: list, c: list, pairing: str) -> None:
    """All moves are carried out at once and nobody grows: a request's places are all different, so that moves end."""
    router = Llumnix(pairing=pairing)
    fleet = [replica(i, *sizes, first=100 * i) for i, sizes in enumerate((a, b, c)) if sum(sizes) <= 100]
    been = {request.id: [each.id] for each in fleet for request in each.requests}
    for _ in range(60):
        made = router.rebalance(fleet, 0)
        if not made:
            return
        by_id = {each.id: each for each in fleet}
        for move in made:
            source, target = by_id[move.source], by_id[move.target]
            source.requests.remove(move.request)
            target.requests.append(move.request)
            been[move.request.id].append(move.target)
        for each in fleet:
            each.num_running = len(each.requests)
            each.num_free_blocks = 100 - sum(-(-request.num_tokens // 16) for request in each.requests)
            assert each.num_free_blocks >= 0
        for places in been.values():
            assert len(places) <= 2 or pairing == "balanced"
            assert all(places[i] != places[i + 2] for i in range(len(places) - 2)), places
    raise AssertionError("moves without end")
