"""Eviction policies: textbook strings, degenerate cases, and what is each one's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.block_pool import CachedBlock
from policies.prefix import block_keys
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.caches import (
    MIXED,
    TREE,
    Cache,
    Chain,
    chains,
    faults,
    single,
    strings,
    victims,
)
from tests.policies.decisions import assert_same_run
from tests.policies.harness import Job
from tests.policies.test_library import jobs
from tests.policies.test_live_change import Operated, _change

SILBERSCHATZ = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
"""Silberschatz, Galvin, Gagne, Operating System Concepts, section on page replacement: 3 frames."""

ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
"""Belady, Nelson, Shedler, CACM 12(6), 1969: FIFO has more faults with 4 frames than with 3."""


# Textbook strings


@pytest.mark.parametrize(("policy", "expected"), [("fifo", 15), ("lru", 12), ("belady", 9)])
def test_the_textbooks_string_has_the_textbooks_page_faults(policy: str, expected: int) -> None:
    assert faults(SILBERSCHATZ, policy, 3) == expected


def test_with_more_memory_fifo_may_hit_less_and_lru_and_belady_do_not() -> None:
    assert [faults(ANOMALY, "fifo", frames) for frames in (3, 4)] == [9, 10]
    assert [faults(ANOMALY, "lru", frames) for frames in (3, 4)] == [10, 8]
    assert [faults(ANOMALY, "belady", frames) for frames in (3, 4)] == [7, 6]


@given(strings, st.integers(1, 6))
def test_lru_and_belady_never_hit_less_with_more_memory(string: list[int], frames: int) -> None:
    for policy in ("lru", "belady"):
        assert faults(string, policy, frames + 1) <= faults(string, policy, frames)


def test_a_scan_does_not_flush_what_arc_and_s3_fifo_have_seen_twice() -> None:
    string = [*range(4)] * 4 + [*range(100, 140)] + [*range(4)]
    assert sum(Cache(single(string), "lru", 10).hits[-4:]) == 0
    assert sum(Cache(single(string), "arc", 10).hits[-4:]) == 4
    assert sum(Cache(single(string), "s3_fifo", 10).hits[-4:]) == 4


def test_arcs_target_follows_its_ghosts() -> None:
    policy: Any = registry.make("eviction", "arc")
    Cache(single([1, 2, 1, 3, 4]), policy, 3)  # T2: 1, T1: 3 and 4; 2 was evicted from T1
    assert (list(policy._ghosts[0]), list(policy._ghosts[1]), policy._target) == ([b"2"], [], 0.0)
    policy = registry.make("eviction", "arc")
    Cache(single([1, 2, 1, 3, 4, 2]), policy, 3)
    assert policy._target == 1.0  # one hit in B1, with nothing in B2
    assert list(policy._ghosts[0]) == [b"3"]  # made room for 2, which is in T2 now


# Policies that are another one


LRU_BY_ANOTHER_NAME = [
    "t_lru,budget=0",
    "t_lru,budget=1000000",
    "gdsf,frequency=false",
    "slru,protected_hits=1000000",
]


@pytest.mark.parametrize("policy", LRU_BY_ANOTHER_NAME)
@settings(max_examples=30, deadline=None)
@given(chains, st.integers(8, 24))
def test_a_degenerate_policy_lets_the_same_blocks_go_as_lru(policy: str, served: list[Chain], num_blocks: int) -> None:
    assert victims(policy, served, num_blocks) == victims("lru", served, num_blocks)


@pytest.mark.parametrize("policy", LRU_BY_ANOTHER_NAME)
@settings(max_examples=8, deadline=None)
@given(jobs(), st.sampled_from([28, 40]), st.sampled_from([0, 1]))
def test_a_degenerate_policy_decides_as_lru_does(policy: str, work: list[Job], num_blocks: int, lag: int) -> None:
    limits = Limits(num_blocks, 4, 6, 32, 110, lag=lag)
    assert_same_run(limits, work, StackSpec(eviction=policy), StackSpec(eviction="lru"))


def test_the_policies_that_are_no_lru_evict_otherwise() -> None:
    usual = victims("lru", MIXED, 16)
    for policy in ("fifo", "lfu", "slru", "gdsf", "arc", "s3_fifo", "t_lru,budget=20,next_prompt=0", "belady"):
        assert victims(policy, MIXED, 16) != usual, policy


# One by one


def test_t_lru_gives_up_the_end_of_the_newest_conversation_before_the_start_of_the_oldest() -> None:
    old, new = tuple(block_keys([1] * 24, 4)), tuple(block_keys([2] * 40, 4))  # 6 and 10 blocks of 4 tokens
    more = [tuple(block_keys([10 + n] * 4, 4)) for n in range(3)]
    # H = 24: B = 24 + 8 - 16 = 16, so blocks 4 and 5 are safe. H = 40: B = 32, so 8 and 9 are. H = 4: B = 0.
    went = victims("t_lru,budget=16,next_prompt=8", [old, new, *more], 16)
    assert went == [old[5], old[4], new[9]]
    assert victims("t_lru,budget=16,next_prompt=8", [old, new, *more, (b"x",)], 16)[3:] == [new[8]]
    assert victims("lru", [old, new, *more], 16) == [old[5], old[4], old[3]]


def test_gdsf_keeps_what_is_deep_and_dear_as_long_as_it_can_be_found() -> None:
    deep, flat = TREE[-1], [(b"%d" % n,) for n in range(8)]
    served = [deep, *flat[:4], (b"x",), (b"y",)]
    # H of a block at depth d is 1 + d / 4: the ends of the deep chain are worth up to 2.75, a flat block 1.
    assert victims("gdsf,crossover=4", served, 12)[:2] == [b"0", b"1"]
    assert victims("gdsf", served, 12)[:2] == [deep[7], deep[6]]


def test_gdsfs_clock_does_not_go_back_when_a_parent_goes_after_its_dearer_child() -> None:
    policy: Any = registry.make("eviction", "gdsf,crossover=4", block_size=4)
    parent, child = CachedBlock(0, b"p", 0, None), CachedBlock(1, b"c", 1, b"p")
    policy.on_idle(child, 0)
    policy.on_idle(parent, 0)
    assert [policy.pop_victim(0), policy.pop_victim(0)] == [child, parent]  # H = 2, then H = 1
    assert policy.rank(CachedBlock(2, b"new", 0, None), 0) == 3.0


def test_gdsf_lets_old_popularity_fade_and_lfu_does_not() -> None:
    string = [0] * 6 + list(range(1, 9)) * 4
    assert b"0" in victims("gdsf", single(string), 3)
    assert b"0" not in victims("lfu", single(string), 3)


NO_ORACLE = [name for name in registry.names("eviction") if name != "belady"]


@settings(max_examples=30, deadline=None)
@given(jobs(), st.dictionaries(st.integers(0, 40), st.sampled_from(NO_ORACLE).map(lambda name: _change(eviction=name))))
def test_any_policy_may_be_put_in_place_of_any_other_while_requests_run(work: list[Job], acts: dict[int, Any]) -> None:
    drive = Operated(Limits(28, 4, 6, 32, 110), StackSpec(eviction="arc"), work, acts)
    assert drive.plane.view.num_free_blocks + sum(r.num_blocks for r in drive.requests) == 28
    for i, job in enumerate(work):
        if drive.status(i) in ("stop", "length"):
            assert drive.output_tokens(i) == job.output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slru,protected_hits=0", "at least 1"),
        ("gdsf,crossover=0", "at least 1 token"),
        ("t_lru,budget=-1", "0 or more"),
        ("s3_fifo,small=1", "below 1"),
        ("s3_fifo,small=0", "above 0"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        registry.make("eviction", text, block_size=4)
