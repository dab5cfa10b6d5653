"""Each router against its paper: formulas by hand, published examples, bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Router
from policies.request import Request
from policies.routing import InFlight, RoutedPrefixes, num_uncached_tokens
from tests.policies.fleet import Loaded, chain, prompt

SECOND = 1_000_000_000


def make(text: str, seed: int = 0) -> Router:
    return registry.make("router", text, seed=seed, block_size=16)


def send(router: Router, request: Request, fleet: Sequence[Loaded], keys: Sequence[bytes] = (), now: int = 0) -> int:
    """Where it goes; the replica has it from then on."""
    route = router.route(request, keys, fleet, now)
    assert route is not None
    replica = next(replica for replica in fleet if replica.id == route.replica)
    replica.num_running += 1
    return replica.id


def fleet_of(loads: Sequence[int], **more: object) -> list[Loaded]:
    return [Loaded(i, num_running=load, **more) for i, load in enumerate(loads)]  # type: ignore[arg-type]


# What routers share


def test_the_larger_of_the_own_and_the_reported_count_is_the_load() -> None:
    replica = Loaded(4, num_waiting=1, num_running=2)
    loads = {which: InFlight(which) for which in ("both", "reported", "own")}
    assert {which: flight.load(replica) for which, flight in loads.items()} == {"both": 3, "reported": 3, "own": 0}
    for i in range(5):
        for flight in loads.values():
            flight.sent(prompt(i), 4)
    assert {which: flight.load(replica) for which, flight in loads.items()} == {"both": 5, "reported": 3, "own": 5}
    for flight in loads.values():
        flight.ended(prompt(3))
        flight.ended(prompt(3))
        flight.ended(prompt(77))
    assert loads["own"].load(replica) == len(loads["own"]) == 4


def test_a_request_that_is_routed_anew_counts_where_it_is_now() -> None:
    flight = InFlight("own")
    flight.sent(prompt(0), 1)
    flight.sent(prompt(0), 2)
    assert [flight.load(Loaded(i)) for i in (1, 2)] == [0, 1]


@pytest.mark.parametrize(("blocks", "tokens"), [(0, 64), (2, 32), (3, 16), (4, 16), (9, 16)])
def test_the_last_tokens_of_a_prompt_are_computed_even_if_all_its_blocks_are_cached(blocks: int, tokens: int) -> None:
    assert num_uncached_tokens(prompt(0, 4), blocks, 16) == tokens


class SlowPrefixes:
    """Where prompts went, the slow way: for each replica the blocks in order of their last use."""

    def __init__(self) -> None:
        self.used: dict[int, dict[bytes, tuple[int, int]]] = {}
        self.clock = 0

    def sent(self, keys: list[bytes], replica: int, max_blocks: int) -> None:
        self.clock += 1
        used = self.used.setdefault(replica, {})
        used.update({key: (self.clock, -depth) for depth, key in enumerate(keys[:max_blocks])})
        for key in sorted(used, key=lambda key: used[key])[: max(0, len(used) - max_blocks)]:
            del used[key]

    def match(self, keys: list[bytes], replica: int) -> int:
        used = self.used.get(replica, {})
        return next((i for i, key in enumerate(keys) if key not in used), len(keys))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.integers(0, 3), st.booleans()), max_size=40))
def test_the_table_of_prefixes_matches_as_a_search_through_all_that_was_sent(sent: list) -> None:
    fast, slow = RoutedPrefixes(), SlowPrefixes()
    for name, num_blocks, replica, gone in sent:
        keys = chain(name, num_blocks)
        if gone:
            fast.keep_only([i for i in range(4) if i != replica])
            slow.used.pop(replica, None)
        else:
            fast.sent(keys, replica, 12)
            slow.sent(keys, replica, 12)
        for wanted in (chain(other, 9) for other in "abcd"):
            matches = {i: slow.match(wanted, i) for i in range(4)}
            assert {i: fast.match(wanted, i) for i in range(4)} == matches
            best, replicas = fast.best_match(wanted)
            assert best == max(matches.values())
            assert sorted(replicas) == ([i for i in matches if matches[i] == best] if best else [])
        assert len(fast) == sum(len(used) for used in slow.used.values())
        assert all(fast.size(i) == len(slow.used.get(i, ())) for i in range(4))


# Turns and chances


def test_smooth_weighted_turns_are_those_of_nginx() -> None:
    router = make("weighted_round_robin,weights=5:1:1")
    turns = [send(router, prompt(i), fleet_of([0, 0, 0])) for i in range(14)]
    assert turns == [0, 0, 1, 0, 2, 0, 0] * 2


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_each_weighted_round_gives_everybody_exactly_his_weight(weights: list[int]) -> None:
    router = make("weighted_round_robin,weights=" + ":".join(map(str, weights)))
    for _ in range(3):
        turns = Counter(send(router, prompt(i), fleet_of([0] * len(weights))) for i in range(sum(weights)))
        assert turns == Counter(dict(enumerate(weights)))


def test_with_equal_weights_a_weighted_round_is_a_plain_one() -> None:
    plain, weighted = make("round_robin"), make("weighted_round_robin")
    fleet = fleet_of([3, 0, 9])
    assert [send(plain, prompt(i), fleet) for i in range(9)] == [send(weighted, prompt(i), fleet) for i in range(9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weighted_round_robin,weights=1:x", "whole numbers"),
        ("weighted_round_robin,weights=1::2", "whole numbers"),
        ("weighted_round_robin,weights=2:0", "at least 1"),
        ("least_requests,load=none", "load must be one of both, reported, own"),
        ("power_of_two,d=0", "d must be at least 1"),
        ("session,max_sessions=0", "max_sessions"),
        ("consistent_hash,epsilon=-0.1", "epsilon"),
        ("consistent_hash,virtual_nodes=0", "virtual_nodes"),
        ("consistent_hash,key=user", "key must be one of"),
        ("prefix_affinity,threshold=1.5", "threshold"),
        ("prefix_affinity,balance_rel=0.5", "balance_rel"),
        ("lmetric,hotspot=0.5", "hotspot"),
        ("kv_aware,temperature=-1", "temperature"),
        ("preble,window_s=0", "window_s"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(registry.PolicyError, match=message):
        make(text)


def test_random_routes_are_even_and_keyed_by_the_request() -> None:
    router, fleet = make("random", seed=3), fleet_of([0] * 4)
    chosen = [send(router, prompt(i), fleet) for i in range(8_000)]
    # Chi-squared with 3 degrees of freedom: above 16.3 once in a thousand seeds.
    assert sum((n - 2_000) ** 2 / 2_000 for n in Counter(chosen).values()) < 16.3
    again = make("random", seed=3)
    assert [send(again, prompt(i), fleet) for i in reversed(range(0, 8_000, 2))] == chosen[::2][::-1]
    assert [send(make("random", seed=4), prompt(i), fleet) for i in range(50)] != chosen[:50]


# Queues


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_shortest_queue_counts_waiting_and_running_requests(queues: list[tuple[int, int]]) -> None:
    fleet = [Loaded(9 - i, num_waiting=w, num_running=r) for i, (w, r) in enumerate(queues)]
    shortest = min(fleet, key=lambda replica: (replica.num_waiting + replica.num_running, replica.id)).id
    assert make("least_requests").route(prompt(0), [], fleet, 0).replica == shortest
    assert make("power_of_two,d=8").route(prompt(0), [], fleet, 0).replica == shortest


@given(st.lists(st.integers(0, 9), min_size=3, max_size=12), st.integers(2, 12), st.integers(0, 999))
def test_of_d_choices_none_is_drawn_twice_and_the_least_loaded_is_taken(loads: list[int], d: int, id: int) -> None:
    fleet = fleet_of(loads)
    chosen = make(f"power_of_two,d={d}").route(prompt(id), [], fleet, 0).replica
    # At least d - 1 others are no better than the one that is taken.
    assert sum((load, i) > (loads[chosen], chosen) for i, load in enumerate(loads)) >= min(d, len(loads)) - 1


def test_two_choices_are_all_pairs_equally_often() -> None:
    fleet = fleet_of([0, 1, 2, 3])  # of a pair the lower one is taken: 0 in 3 of 6 pairs, 1 in 2, 2 in 1, 3 never
    router = make("power_of_two,load=reported")
    chosen = Counter(router.route(prompt(i), [], fleet, 0).replica for i in range(6_000))
    expected = {0: 3_000, 1: 2_000, 2: 1_000}
    assert chosen[3] == 0
    # Chi-squared with 2 degrees of freedom: above 13.8 once in a thousand seeds.
    assert sum((chosen[i] - n) ** 2 / n for i, n in expected.items()) < 13.8


def test_one_choice_is_random_with_the_load_looked_at_in_vain() -> None:
    router = make("power_of_two,d=1,load=own")
    assert len({send(router, prompt(i), fleet_of([0] * 4)) for i in range(40)}) == 4


def longest_queue(text: str, n: int, seed: int) -> int:
    """n requests to n replicas, none of which ends."""
    router, fleet = make(text, seed), fleet_of([0] * n)
    return max(Counter(send(router, prompt(i), fleet) for i in range(n)).values())


def test_the_longest_queue_shrinks_from_chance_to_two_choices_to_all() -> None:
    """Mitzenmacher, with n = 1,000: log n / log log n = 3.6 and log log n / log 2 = 2.8, each plus O(1)."""
    seeds = range(6)
    by_chance = [longest_queue("random", 1_000, seed) for seed in seeds]
    of_two = [longest_queue("power_of_two,load=own", 1_000, seed) for seed in seeds]
    assert all(5 <= most <= 8 for most in by_chance)
    assert all(3 <= most <= 4 for most in of_two)
    assert longest_queue("least_requests,load=own", 1_000, 0) == 1


# Sessions and rings


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


# Prefixes


def test_a_prompt_goes_where_most_of_it_went_before_and_a_new_one_to_the_smallest_tree() -> None:
    router, fleet = make("prefix_affinity"), fleet_of([0, 0, 0])
    assert send(router, prompt(0, 8), fleet, chain("a", 8)) == 0
    assert send(router, prompt(1, 4), fleet, chain("b", 4)) == 1
    assert send(router, prompt(2, 2), fleet, chain("c", 2)) == 2
    assert send(router, prompt(3, 12), fleet, chain("a", 12)) == 0  # 8 of 12 blocks
    assert send(router, prompt(4, 8), fleet, [*chain("b", 4), *chain("x", 4)]) == 2  # a half is not more than a half
    assert send(router, prompt(5, 7), fleet, [*chain("b", 4), *chain("y", 3)]) == 1


@pytest.mark.parametrize(
    ("loads", "to"),
    [
        ([32, 0, 5], 0),  # 32 apart is not more than 32
        ([33, 0, 5], 1),
        ([363, 330, 340], 0),  # 33 apart, but not more than 1.1 times
        ([364, 330, 340], 1),
    ],
)
def test_affinity_ends_where_the_replicas_are_out_of_balance(loads: list[int], to: int) -> None:
    router, fleet = make("prefix_affinity"), fleet_of([0, 0, 0])
    assert send(router, prompt(0, 8), fleet, chain("a", 8)) == 0
    for replica, load in zip(fleet, loads, strict=True):
        replica.num_running = load
    assert send(router, prompt(1, 8), fleet, chain("a", 8)) == to


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=40))
def test_affinity_with_no_slack_always_takes_a_least_loaded_replica(prompts: list[tuple[str, int]]) -> None:
    router, fleet = make("prefix_affinity,balance_abs=0,balance_rel=1"), fleet_of([2, 0, 1])
    for i, (name, num_blocks) in enumerate(prompts):
        least = min(replica.num_running for replica in fleet)
        to = send(router, prompt(i, max(1, num_blocks)), fleet, chain(name, num_blocks))
        assert fleet[to].num_running == least + 1


def test_the_documented_example_costs_18_10_and_11_and_the_second_worker_wins() -> None:
    router = make("kv_aware")
    blocks = [(8, 10), (5, 5), (2, 9)]
    assert [router.cost(*pair) for pair in blocks] == [18, 10, 11]
    # The same from a prompt of 10 blocks, whose own blocks count with the decode blocks of each.
    keys = chain("a", 10)
    fleet = [
        Loaded(i, num_free_blocks=100 - decode, cached=set(keys[: 10 - prefill]))
        for i, (prefill, decode) in enumerate(blocks, start=1)
    ]
    assert [router.replica_cost(prompt(0, 10), keys, replica) for replica in fleet] == [28, 20, 21]
    assert send(router, prompt(0, 10), fleet, keys) == 2
    by_load, by_cache = make("kv_aware,weight=0"), make("kv_aware,weight=4")
    assert [by_load.cost(*pair) for pair in blocks] == [10, 5, 9]
    assert send(by_cache, prompt(0, 10), fleet, keys) == 3  # 42, 25, 17


def test_blocks_that_prompts_in_flight_share_count_once_and_go_with_the_last_of_them() -> None:
    router, replica = make("kv_aware"), Loaded(0)
    long, short = prompt(0, 10), prompt(1, 6)
    router.route(long, chain("a", 10), [replica], 0)
    router.route(short, chain("a", 6), [replica], 0)
    other = Request(2, 2, 33, 16)  # two whole blocks and one token
    assert router.replica_cost(other, chain("b", 2), replica) == 33 / 16 + 10 + 3
    router.on_end(long, 0, 1)
    assert router.replica_cost(other, chain("b", 2), replica) == 33 / 16 + 6 + 3
    assert router.replica_cost(prompt(3, 4), chain("a", 4), replica) == 4 + 6 + 0  # its blocks are in use there
    replica.num_free_blocks, replica.num_prefill_tokens = 80, 64
    assert router.replica_cost(other, chain("b", 2), replica) == (64 + 33) / 16 + 20 + 3


def test_a_temperature_draws_with_the_softmax_of_the_costs() -> None:
    fleet = [Loaded(i, num_free_blocks=100 - used) for i, used in enumerate((10, 15, 20))]
    router, tries = make("kv_aware,temperature=0.5"), 5_000
    chosen: Counter[int] = Counter()
    for i in range(tries):
        chosen[router.route(prompt(i), [], fleet, 0).replica] += 1
        router.on_end(prompt(i), 0, 0)
    weights = [math.exp(-x / 0.5) for x in (0, 0.5, 1)]
    # Chi-squared with 2 degrees of freedom: above 13.8 once in a thousand seeds.
    expected = [tries * weight / sum(weights) for weight in weights]
    assert sum((chosen[i] - n) ** 2 / n for i, n in enumerate(expected)) < 13.8
    equal = [Loaded(i) for i in range(3)]
    assert len({make("kv_aware,temperature=0.1").route(prompt(i), [], equal, 0).replica for i in range(30)}) == 3


def test_lmetric_multiplies_what_is_to_compute_by_who_is_there() -> None:
    keys = chain("a", 10)
    fleet = [
        Loaded(0, num_running=1),  # 160 tokens * 2 = 320
        Loaded(1, num_waiting=2, num_running=1, cached=set(keys[:5])),  # 80 * 4 = 320, and fewer tokens
        Loaded(2, num_running=5, cached=set(keys[:8])),  # 32 * 6 = 192
    ]
    assert send(make("lmetric"), prompt(0, 10), fleet, keys) == 2
    fleet[2].num_running = 10  # 32 * 11 = 352
    assert send(make("lmetric"), prompt(0, 10), fleet, keys) == 1
    fleet[0].num_running = 0  # 160 * 1
    assert send(make("lmetric"), prompt(0, 10), fleet, keys) == 0


def test_lmetric_sends_nobody_to_a_hotspot() -> None:
    keys = chain("a", 100)
    # 16 tokens * 13 there against 1600 * 5 elsewhere; all in flight are 25, and at most ceil(2 * 25 / 4) = 13 fit.
    fleet = [Loaded(0, num_running=12, cached=set(keys)), *(Loaded(i, num_running=4) for i in (1, 2, 3))]
    assert send(make("lmetric"), prompt(0, 100), fleet, keys) == 0
    assert send(make("lmetric"), prompt(1, 100), fleet, keys) == 1  # with 14 it would be one more than ceil(26 / 2)
    assert send(make("lmetric,hotspot=none"), prompt(2, 100), fleet, keys) == 0


def served(id: int, blocks: int, output: int) -> Request:
    return prompt(id, blocks, hints={"output_tokens": output})


def test_preble_exploits_a_match_of_half_the_prompt_and_else_explores() -> None:
    router, fleet = make("preble,decode_cost=1,balance=9"), fleet_of([0, 0, 0])
    a, b = chain("a", 10), chain("b", 10)
    assert send(router, served(0, 10, 40), fleet, a) == 0  # L = 200, 0, 0
    assert send(router, served(1, 10, 0), fleet, b) == 1  # L = 200, 160, 0
    assert send(router, served(2, 2, 0), fleet, chain("c", 2)) == 2  # L = 200, 160, 32
    # 5 of 10 blocks are cached: as many as are missed, so it goes there, though that one has the most work. L = 280.
    assert send(router, served(3, 10, 0), fleet, [*a[:5], *chain("d", 5)]) == 0
    # 4 of 10: explore. L + P = 280 + 96, 160 + 160, 32 + 160.
    assert send(router, served(4, 10, 0), fleet, [*a[:4], *chain("e", 6)]) == 2  # L = 280, 160, 192
    # 2 of 5, with P = 48, 80, 80: 328, 240, 272.
    assert send(router, served(5, 5, 0), fleet, [*a[:2], *chain("f", 3)]) == 1


def test_preble_takes_the_lighter_of_two_that_match_alike() -> None:
    router, fleet = make("preble,decode_cost=1,balance=9"), fleet_of([0, 0])
    a = chain("a", 4)
    assert send(router, served(0, 4, 100), fleet, a) == 0  # L = 164, 0
    assert send(router, served(1, 9, 0), fleet, [*a, *chain("x", 5)]) == 1  # 4 of 9: 164 + 80 against 144
    assert send(router, served(2, 4, 10), fleet, a) == 1  # L = 164, 144: both have it. L = 164, 170 then
    assert send(router, served(3, 4, 0), fleet, a) == 0


def test_preble_rebalances_when_the_heaviest_has_half_as_much_again_as_the_lightest() -> None:
    for second, to in ((107, 0), (106, 1)):  # 160 against 1.5 * 107 = 160.5 and 1.5 * 106 = 159
        router, fleet = make("preble,decode_cost=1"), fleet_of([0, 0])
        a = chain("a", 4)
        assert send(router, served(0, 4, 96), fleet, a) == 0
        assert send(router, served(1, 1, second - 16), fleet, chain("b", 1)) == 1
        assert send(router, served(2, 4, 0), fleet, a) == to


def test_preble_forgets_the_work_of_three_minutes_ago_but_not_the_prefix() -> None:
    router, fleet = make("preble,decode_cost=1,balance=9"), fleet_of([0, 0])
    a = chain("a", 10)
    assert send(router, served(0, 10, 1_000), fleet, a, 0) == 0
    assert send(router, served(1, 1, 0), fleet, chain("b", 1), 179 * SECOND) == 1
    assert send(router, served(2, 1, 0), fleet, chain("c", 1), 180 * SECOND - 1) == 1
    assert send(router, served(3, 1, 0), fleet, chain("d", 1), 180 * SECOND) == 0
    assert send(router, served(4, 10, 0), fleet, a, 181 * SECOND) == 0


@pytest.mark.parametrize(("num_blocks", "to"), [(10, 1), (100, 0)])
def test_preble_spares_a_cache_that_is_in_use(num_blocks: int, to: int) -> None:
    router = make("preble,decode_cost=0,balance=99")
    fleet = [Loaded(i, num_blocks=num_blocks) for i in (0, 1)]
    assert send(router, served(0, 10, 0), fleet, chain("a", 10), 0) == 0
    assert send(router, served(1, 10, 0), fleet, chain("b", 10), 0) == 1
    assert send(router, served(2, 10, 0), fleet, chain("a", 10), 100 * SECOND) == 0
    assert send(router, Request(3, 3, 40, 16, hints={"output_tokens": 0}), fleet, [], 150 * SECOND) == 1
    # In the window then: L = 16, whose request uses all ten blocks, and L = 40, with ten blocks that nobody uses.
    # A new prompt of five blocks, with room for ten: 16 + M + P = 16 + 80 + 80 against 40 + 0 + 80; else M = 0.
    assert send(router, served(4, 5, 0), fleet, chain("n", 5), 200 * SECOND) == to


def test_preble_measures_an_eviction_by_the_share_of_requests_that_use_the_block() -> None:
    router, fleet = make("preble,decode_cost=0,balance=99"), [Loaded(0, num_blocks=8)]
    send(router, served(0, 4, 0), fleet, chain("a", 4), 0)
    send(router, served(1, 4, 0), fleet, chain("b", 4), 1)
    for i in (2, 3):
        send(router, served(i, 4, 0), fleet, chain("a", 4), i)
    # Of 4 requests in the window 3 use each block of a, 1 each of b. Least recently used: b4 to b1, then a4 to a1.
    for blocks, users in ((1, 1), (4, 4), (5, 7), (8, 16)):
        cost = router._own_cost(served(9, blocks, 0), 0, 0, 8)  # type: ignore[attr-defined]
        assert cost == 16 * users / 4 + 16 * blocks


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(0, 90)), max_size=50))
def test_preble_knows_the_window_and_the_cache_as_a_list_of_all_that_was_sent_does(sent: list) -> None:
    """One replica with room for all, so that nothing is evicted: its load, its warm blocks, and what it matches."""
    router, fleet = make("preble,decode_cost=0"), [Loaded(0, num_blocks=1_000)]
    now, history = 0, []
    for i, (name, num_blocks, gap) in enumerate(sent):
        now += gap * SECOND
        before = [keys for _, _, keys in history]
        keys = chain(name, num_blocks)
        match = max([len([k for k in keys if k in old]) for old in before], default=0)
        history.append((now, num_uncached_tokens(prompt(i, num_blocks), match, 16), keys))
        send(router, served(i, num_blocks, 0), fleet, keys, now)
        recent = [(work, keys) for at, work, keys in history if at > now - 180 * SECOND]
        state = router._sent[0]  # type: ignore[attr-defined]
        assert state.load == sum(work for work, _ in recent)
        users = {key: users for key, (users, _) in state._warm.items()}
        assert users == Counter(key for _, keys in recent for key in keys)
        assert state.match(chain(name, 12)) == max(len(keys) for _, _, keys in history if keys[0] == chain(name, 1)[0])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(0, 90)), max_size=50))
def test_preble_never_has_a_block_without_all_those_before_it(sent: list) -> None:
    """In a cache of nine blocks, where blocks are evicted and sent again within the window."""
    router, fleet, now = make("preble,decode_cost=0"), [Loaded(0, num_blocks=9)], 0
    for i, (name, num_blocks, gap) in enumerate(sent):
        now += gap * SECOND
        send(router, served(i, num_blocks, 0), fleet, chain(name, num_blocks), now)
        state = router._sent[0]  # type: ignore[attr-defined]
        assert len(state._warm) + len(state._cold) <= 9
        for wanted in (chain(other, 12) for other in "abc"):
            known = [key in state._warm or key in state._cold for key in wanted]
            assert known == sorted(known, reverse=True)
            assert state.match(wanted) == sum(known)


# Old figures


def test_the_own_count_keeps_old_figures_from_sending_everybody_to_one() -> None:
    fleet = fleet_of([3, 0, 1])
    reported, counted = make("stale,router=least_requests/load=reported"), make("stale,router=least_requests")
    assert [reported.route(prompt(i), [], fleet, 0).replica for i in range(6)] == [1] * 6
    chosen = [counted.route(prompt(i), [], fleet, 0).replica for i in range(9)]
    assert Counter(chosen)[1] <= 4
    assert any(a != b for a, b in pairwise(chosen))


def test_old_figures_are_those_of_the_last_refresh_for_every_member() -> None:
    seen: list[tuple[int, ...]] = []

    class Watcher:
        def route(self, request: Request, keys: object, replicas: Sequence[Loaded], now: int) -> None:
            r = replicas[0]
            seen.append((r.num_waiting, r.num_running, r.num_prefill_tokens, r.num_outstanding_tokens))
            seen[-1] += (r.num_blocks, r.num_free_blocks)

        def on_end(self, request: Request, replica: int, now: int) -> None: ...

    router = make("stale,refresh_ms=1")
    router._router = Watcher()  # type: ignore[attr-defined]
    replica = Loaded(0, 5, 1, 2, 30, 40, 4)
    router.route(prompt(0), [], [replica], 0)
    replica.num_waiting = replica.num_running = replica.num_prefill_tokens = replica.num_outstanding_tokens = 9
    replica.num_blocks = replica.num_free_blocks = 99
    router.route(prompt(1), [], [replica], 999_999)
    router.route(prompt(2), [], [replica], 1_000_000)
    assert seen == [(1, 2, 4, 5, 40, 30)] * 2 + [(9, 9, 9, 9, 99, 99)]
