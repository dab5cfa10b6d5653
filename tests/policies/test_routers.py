"""Where a request goes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import registry
from policies.contract import Replica, Route
from policies.request import Request
from tests.policies.fleet import Loaded, make_router


def replicas(loads: list[int]) -> list[Replica]:
    return [Loaded(i, load) for i, load in enumerate(loads)]


def routed(name: str, loads: list[int], times: int) -> list[Route | None]:
    router = registry.make("router", name)
    return [router.route(Request(i, i, 4, 4), [], replicas(loads), i) for i in range(times)]


def test_round_robin_takes_turns_whatever_the_load() -> None:
    assert routed("round_robin", [9, 0, 5], 7) == [Route(i) for i in (0, 1, 2, 0, 1, 2, 0)]


def test_round_robin_goes_on_when_a_replica_comes_or_goes() -> None:
    router = registry.make("router", "round_robin")
    chosen = [router.route(Request(i, i, 4, 4), [], replicas([0] * (3 if i < 3 else 2)), i).replica for i in range(7)]
    assert set(chosen[3:]) == {0, 1}
    assert all(a != b for a, b in pairwise(chosen[3:]))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_least_tokens_picks_the_smallest_load_and_of_equal_ones_the_lowest_id(loads: list[int]) -> None:
    assert routed("least_tokens", loads, 1) == [Route(loads.index(min(loads)))]


def test_least_tokens_does_not_go_by_the_order_in_which_the_replicas_are_listed() -> None:
    router = registry.make("router", "least_tokens")
    listed = [Loaded(2, 3), Loaded(1, 3), Loaded(0, 4)]
    assert router.route(Request(0, 0, 4, 4), [], listed, 0) == Route(1)


@pytest.mark.parametrize("name", registry.names("router"))
def test_a_router_hears_of_ends_and_goes_on(name: str) -> None:
    router = make_router(name)
    request = Request(0, 0, 4, 4)
    route = router.route(request, [], replicas([0]), 0)
    assert route.replica == 0
    router.on_end(request, 0, 5)
    assert router.route(Request(1, 5, 4, 4), [], replicas([0]), 5).replica == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 5), min_size=3, max_size=3)), max_size=20))
def test_a_stale_router_decides_by_what_was_read_at_the_last_refresh(calls: list[tuple[int, list[int]]]) -> None:
    fleet, router = [Loaded(i) for i in range(3)], registry.make("router", "stale,refresh_ms=0.00005")
    fresh = registry.make("router", "least_tokens")
    now, read_at, seen = 0, 0, [0, 0, 0]
    router.route(Request(0, 0, 4, 4), [], fleet, now)
    for gap, loads in calls:
        now += gap
        for replica, load in zip(fleet, loads, strict=True):
            replica.num_outstanding_tokens = load
        if now - read_at >= 50:
            read_at, seen = now, loads
        request = Request(1, now, 4, 4)
        assert router.route(request, [], fleet, now) == fresh.route(request, [], replicas(seen), now)


def test_a_stale_router_reads_a_replica_that_joins_or_is_replaced_at_once() -> None:
    router = registry.make("router", "stale,refresh_ms=1000")
    fleet = [Loaded(0, 5), Loaded(1, 7)]
    assert router.route(Request(0, 0, 4, 4), [], fleet, 0) == Route(0)
    assert router.route(Request(1, 1, 4, 4), [], [*fleet, Loaded(2, 1)], 1) == Route(2)
    assert router.route(Request(2, 2, 4, 4), [], [Loaded(0, 9), Loaded(1, 0)], 2) == Route(1)


def test_a_stale_router_wraps_any_other() -> None:
    assert routed("stale,router=round_robin", [9, 0], 3) == [Route(0), Route(1), Route(0)]
    with pytest.raises(registry.PolicyError, match="no router 'nobody'"):
        registry.make("router", "stale,router=nobody")
    with pytest.raises(registry.PolicyError, match="refresh_ms must be at least 0"):
        registry.make("router", "stale,refresh_ms=-1")
