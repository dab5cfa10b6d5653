"""What must hold of every router: it names one that takes requests, decides alike twice, and forgets."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import LATER, Route, Router
from tests.policies.fleet import Loaded, chain, make_router, prompt

SMALL = {"session": "session,max_sessions=40", "weighted_round_robin": "weighted_round_robin,weights=3:1:2"}
"""Knobs that matter in a small world; the others are tested as they come."""

NAMES = [SMALL.get(name, name) for name in registry.names("router")]
ROUTERS = [
    *NAMES,
    *(
        f"stale,router={name.replace(',', '/')},refresh_ms=0.00001"
        for name in NAMES
        if name != "stale" and not registry.moves_kv(registry.find("router", name.split(",")[0]))
    ),
    "consistent_hash,epsilon=0",
    "consistent_hash,epsilon=none,virtual_nodes=1",
    "kv_aware,temperature=0.5",
    "lmetric,hotspot=none",
    "mooncake,prefill=2,threshold=none,reject=never",
    "mooncake,prefill=2,reject=predicted,ttft_ms=1e9,tbt_ms=1e9",
    "power_of_two,d=3,load=own",
    "prefix_affinity,balance_abs=0,balance_rel=1",
]
BY_PLACE = ("random", "round_robin", "power_of_two", "kv_aware,temperature")
"""Those that draw a place in the list, or take it in turn: another order of the list is another decision."""


@dataclass
class World:
    """Replicas that come and go, and the requests that live on them."""

    router: Router
    fleet: dict[int, Loaded] = field(default_factory=lambda: {i: Loaded(i, num_blocks=50) for i in range(3)})
    reverse: bool = False
    live: dict[int, int] = field(default_factory=dict)
    routed: list[Route] = field(default_factory=list)
    now: int = 0

    def arrive(self, prefix: str, num_blocks: int, session: int | None, tenant: str) -> None:
        self.now += 1
        id = len(self.routed)
        request = prompt(id, num_blocks, session=session, tenant=tenant)
        listed = sorted(self.fleet.values(), key=lambda replica: replica.id, reverse=self.reverse)
        route = self.router.route(request, chain(prefix, num_blocks), listed, self.now)
        assert route is not None
        assert route.replica in self.fleet
        assert registry.moves_kv(self.router) or (route.kv_from is None and route.decode_replica is None)
        assert route.kv_from in (None, *self.fleet)
        assert route.decode_replica in (None, LATER, *self.fleet)
        if route.decode_replica == LATER:
            assert self.router.pull(request, listed, self.now) in (None, *self.fleet)  # type: ignore[attr-defined]
        replica = self.fleet[route.replica]
        replica.num_running += 1
        replica.num_outstanding_tokens += request.num_prompt_tokens
        replica.num_prefill_tokens += request.num_prompt_tokens
        replica.num_free_blocks -= 1
        replica.cached.update(chain(prefix, num_blocks))
        self.live[id] = route.replica
        self.routed.append(route)

    def end(self, id: int) -> None:
        self.now += 1
        at = self.live.pop(id)
        self.router.on_end(prompt(id), at, self.now)
        if at in self.fleet:
            self.fleet[at].num_running = max(0, self.fleet[at].num_running - 1)

    def do(self, what: tuple) -> None:
        """One of EVENTS, as far as it makes sense."""
        kind, *arguments = what
        if kind == "arrive":
            self.arrive(*arguments)
        elif kind == "end" and self.live:
            self.end(sorted(self.live)[arguments[0] % len(self.live)])
        elif kind == "join":
            self.fleet.setdefault(arguments[0], Loaded(arguments[0], num_blocks=50))
        elif kind == "leave" and len(self.fleet) > 1:
            self.fleet.pop(arguments[0], None)
        elif kind == "restart" and arguments[0] in self.fleet:
            self.fleet[arguments[0]] = Loaded(arguments[0], num_blocks=50)
        elif kind == "stranger":  # of a request that another router has routed
            self.router.on_end(prompt(10_000), arguments[0], self.now)


SOME = st.integers(0, 8)
EVENTS = st.one_of(
    st.tuples(
        st.just("arrive"),
        st.sampled_from("abc"),
        st.integers(1, 60),
        st.one_of(st.none(), st.integers(0, 3)),
        st.sampled_from(["", "t"]),
    ),
    st.tuples(st.just("end"), st.integers(0, 99)),
    st.tuples(st.sampled_from(["join", "leave", "restart", "stranger"]), SOME),
)


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=30, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_every_request_goes_to_a_replica_that_takes_requests_and_twice_to_the_same(name: str, events: list) -> None:
    one, other = (World(make_router(name)) for _ in "ab")
    for event in events:
        one.do(event)
        other.do(event)
    assert one.routed == other.routed


@pytest.mark.parametrize("name", [name for name in ROUTERS if not any(p in name for p in BY_PLACE)])
@settings(max_examples=20, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_the_order_in_which_the_replicas_are_listed_decides_nothing(name: str, events: list) -> None:
    plain = World(make_router(name))
    reversed_ = World(make_router(name), reverse=True)
    for event in events:
        plain.do(event)
        reversed_.do(event)
    assert plain.routed == reversed_.routed


@pytest.mark.parametrize("name", ROUTERS)
def test_requests_sessions_and_replicas_that_are_gone_leave_nothing_behind(name: str) -> None:
    world = World(make_router(name))

    def serve(many: int) -> int:
        """So many more requests, twenty at a time, each with a session and a prompt of its own. Bytes of state."""
        for _ in range(many):
            i = len(world.routed)
            world.now += 2_000_000_000
            world.arrive(f"p{i}", 12, session=i, tenant=f"t{i}")
            if len(world.live) == 20:
                world.end(min(world.live))
            if i % 50 == 0:  # a new replica in an old one's place, which still has requests
                world.do(("join", i // 50 + 3))
                world.do(("leave", i // 50))
        for replica in world.fleet.values():
            replica.cached.clear()
        return len(pickle.dumps(world.router))

    early = serve(600)
    assert serve(1_400) < 1.3 * early + 500
    for id in sorted(world.live):
        world.end(id)
