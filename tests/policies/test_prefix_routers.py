"""Routers that look at cached prefixes, against their papers and documented examples."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.request import Request
from tests.policies.fleet import Loaded, chain, fleet_of, make, prompt, send


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
