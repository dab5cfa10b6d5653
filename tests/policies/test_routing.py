"""What routers share: counts of requests in flight, and the table of prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.routing import InFlight, RoutedPrefixes, num_uncached_tokens
from tests.policies.fleet import Loaded, chain, prompt


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
