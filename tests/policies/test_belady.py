"""Eviction that knows the future: optimal, and refused where nobody knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.block_pool import CachedBlock
from policies.registry import PolicyError
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.caches import (
    POLICIES,
    faults,
    skewed,
)


def least_faults(string: Sequence[int], frames: int) -> int:
    """By trying every victim at every fault."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for page in string:
        after: dict[frozenset[int], int] = {}
        for cached, count in states.items():
            if page in cached:
                options = [(cached, count)]
            elif len(cached) < frames:
                options = [(cached | {page}, count + 1)]
            else:
                options = [(cached - {victim} | {page}, count + 1) for victim in cached]
            for state, total in options:
                after[state] = min(after.get(state, total), total)
        states = after
    return min(states.values())


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=24), st.integers(1, 4))
def test_belady_is_as_good_as_trying_everything(string: list[int], frames: int) -> None:
    assert faults(string, "belady", frames) == least_faults(string, frames)


@settings(max_examples=30)
@given(skewed, st.integers(1, 8))
def test_no_policy_hits_more_single_blocks_than_belady(string: list[int], frames: int) -> None:
    least = faults(string, "belady", frames)
    for policy in POLICIES:
        assert faults(string, policy, frames) >= least, policy


def test_belady_keeps_what_the_very_next_request_uses() -> None:
    policy: Any = registry.make("eviction", "belady", future={0: (b"a", b"ab"), 1: (b"a",), 2: (b"c",), 3: (b"c",)})
    first = Request(0, 0, 8, 1)
    for i, (key, depth) in enumerate([(b"a", 0), (b"c", 0), (b"x", 0)]):
        policy.on_idle(CachedBlock(i, key, depth, None, first, 0), 0)
    assert [policy.pop_victim(0).key for _ in range(3)] == [b"x", b"c", b"a"]


def test_belady_forgets_a_use_that_was_passed_over() -> None:
    # 3 was to use b, but ends at the gap before it: b is then wanted by nobody, and c by 5.
    a, b, c = b"a", b"b", b"c"
    future = {0: (a, b), 1: (c,), 2: (b"x",), 3: (a, b), 4: (b"y",), 5: (c,)}
    policy: Any = registry.make("eviction", "belady", future=future)
    requests = [Request(n, n, 8, 1) for n in range(6)]
    for i, (key, depth, parent, who) in enumerate([(b, 1, a, 0), (c, 0, None, 1)]):
        policy.on_idle(CachedBlock(i, key, depth, parent, requests[who], 0), 0)
    policy.on_idle(CachedBlock(2, b"x", 0, None, requests[3], 0), 0)  # the clock is at 3
    assert [policy.pop_victim(0).key for _ in range(3)] == [b, b"x", c]


def test_belady_is_refused_where_nobody_knows_the_future() -> None:
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        StackSpec(eviction="belady").build()
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        StackSpec().rebuilt({"eviction": "belady"})
    assert StackSpec(eviction="belady").build(future={}).clairvoyant
    assert StackSpec(eviction="belady").wants_future
    assert not StackSpec(eviction="arc").wants_future
