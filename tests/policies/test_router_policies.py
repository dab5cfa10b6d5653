"""Routers by turns, chance and queues: formulas by hand, published examples, bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import registry
from policies.request import Request
from tests.policies.fleet import Loaded, fleet_of, make, prompt, send

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
