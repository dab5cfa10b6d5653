"""Routers that keep a session or a key in its place: the sticky one, and the ring with bounded loads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Router
from policies.request import Request
from tests.policies.fleet import Loaded, chain, fleet_of, make, prompt, send


def test_a_session_stays_until_its_replica_takes_no_more_requests() -> None:
    router, fleet = make("session"), fleet_of([1, 0, 5])
    assert send(router, prompt(0, session=7), fleet) == 1
    fleet[1].num_running = 50
    assert send(router, prompt(1, session=7), fleet) == 1
    assert send(router, prompt(2, session=8), fleet) == 0
    assert send(router, prompt(3), fleet) == 0  # no session: the shortest queue
    left = [fleet[0], fleet[2]]
    assert send(router, prompt(4, session=7), left) == 0
    fleet[0].num_running = 99
    assert send(router, prompt(5, session=7), fleet) == 0  # its old replica is back, but it has moved


def test_only_the_latest_sessions_are_remembered() -> None:
    router, fleet = make("session,max_sessions=2"), fleet_of([0, 9])
    for i, session in enumerate((1, 2, 1, 3)):
        assert send(router, prompt(i, session=session), fleet) == 0
    fleet[0].num_running = 99
    assert [send(router, prompt(9 + i, session=session), fleet) for i, session in enumerate((1, 3, 2))] == [0, 0, 1]


PLAIN_RING = "consistent_hash,epsilon=none"


def owners(router: Router, ids: Sequence[int], keys: int = 3_000) -> list[int]:
    fleet = [Loaded(i) for i in ids]
    return [router.route(prompt(k, session=k), [], fleet, 0).replica for k in range(keys)]


@pytest.mark.parametrize("joining", [0, 4, 10])
def test_a_replica_that_joins_takes_its_share_of_keys_and_no_other_key_moves(joining: int) -> None:
    router = make(PLAIN_RING)
    others = [i for i in (0, 1, 2, 4, 5, 7, 8, 9, 10) if i != joining]
    before, after = owners(router, others), owners(router, [*others, joining])
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {joining}
    # K / (R + 1) in expectation; with 100 points each an owner's share varies by a tenth, 3,000 keys add 5 %.
    assert len(moved) == pytest.approx(3_000 / 9, rel=0.4)
    assert owners(router, others) == before


@pytest.mark.parametrize("epsilon", [0, 0.01, 0.25, 1])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(-1, 40)), min_size=1, max_size=80), st.integers(1, 7))
def test_no_replica_gets_more_than_the_bound(epsilon: float, events: list[int], n: int) -> None:
    """Sessions 0 to 3 are hot; -1 ends the oldest request."""
    router, fleet = make(f"consistent_hash,epsilon={epsilon}"), fleet_of([0] * n)
    live: list[tuple[Request, int]] = []
    for i, session in enumerate(events):
        if session < 0:
            if live:
                request, at = live.pop(0)
                router.on_end(request, at, i)
                fleet[at].num_running -= 1
            continue
        request = prompt(i, session=session)
        live.append((request, send(router, request, fleet)))
        assert fleet[live[-1][1]].num_running <= math.ceil((1 + epsilon) * len(live) / n)


def test_a_ring_with_no_slack_spreads_one_hot_key_over_everybody() -> None:
    router, fleet = make("consistent_hash,epsilon=0"), fleet_of([0] * 5)
    for i in range(23):
        send(router, prompt(i, session=1), fleet)
    assert sorted(replica.num_running for replica in fleet) == [4, 4, 5, 5, 5]


def test_a_full_owner_passes_to_the_next_one_on_the_ring_that_inherits_its_keys() -> None:
    router, ids = make(PLAIN_RING), [0, 1, 2, 3, 4]
    owner = owners(router, ids, 1)[0]
    heir = owners(router, [i for i in ids if i != owner], 1)[0]
    fleet = fleet_of([0] * 5)
    fleet[owner].num_running = 4
    assert make("consistent_hash").route(prompt(0, session=0), [], fleet, 0).replica == heir


def test_the_key_on_the_ring_is_the_session_or_else_the_tenant_or_else_the_prefix() -> None:
    fleet, router = fleet_of([0] * 50), make(PLAIN_RING)

    def place(keys: Sequence[bytes] = (), **more: object) -> int:
        return router.route(prompt(next(ids), **more), keys, fleet, 0).replica

    ids = iter(range(100))
    assert place(chain("a", 3), session=1, tenant="x") == place(chain("b", 3), session=1, tenant="y")
    assert place(chain("a", 3), tenant="x") == place(chain("b", 3), tenant="x")
    assert place(chain("a", 3)) == place(chain("a", 1))
    assert len({place(chain("a", 1)), place(session=1), place(tenant="x"), place(chain("b", 1))}) > 1
    assert len({place() for _ in range(10)}) > 1
    by_prefix = make(PLAIN_RING + ",key=prefix")
    routes = [by_prefix.route(prompt(i, session=i), chain("a", 2), fleet, 0).replica for i in range(9)]
    assert len(set(routes)) == 1
