"""Preble's router against its paper: what it exploits, explores, forgets and evicts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.request import Request
from policies.routing import num_uncached_tokens
from tests.policies.fleet import SECOND, Loaded, chain, fleet_of, make, prompt, send


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
