"""Eviction policies: textbook strings, slow references, optimality, degenerate cases, and chains that stay whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from policies import registry
from policies.block_pool import BlockPool, CachedBlock
from policies.contract import Eviction
from policies.idle_blocks import IdleBlocks
from policies.prefix import block_keys
from policies.random_stream import RandomStream
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run
from tests.policies.harness import Job
from tests.policies.test_library import jobs
from tests.policies.test_live_change import Operated, _change

POLICIES = [*registry.names("eviction"), "gdsf,crossover=8", "gdsf,remember=true", "lfu,remember=true"]
SILBERSCHATZ = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
"""Silberschatz, Galvin, Gagne, Operating System Concepts, section on page replacement: 3 frames."""
ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
"""Belady, Nelson, Shedler, CACM 12(6), 1969: FIFO has more faults with 4 frames than with 3."""

Chain = tuple[bytes, ...]


class Watched:
    """A policy, the order in which it let blocks go, and the keys that its pool has."""

    def __init__(self, inner: Eviction) -> None:
        self.inner = inner
        self.on_idle, self.on_hit = inner.on_idle, inner.on_hit
        self.victims: list[bytes] = []

    def pop_victim(self, now: int) -> CachedBlock:
        block = self.inner.pop_victim(now)
        self.victims.append(block.key)
        return block


class Cache:
    """Chains served one after another from a pool; `hits` has the number of blocks that each hit."""

    def __init__(self, chains: Sequence[Chain], policy: str | Eviction, num_blocks: int, block_size: int = 4) -> None:
        if isinstance(policy, str):
            future = dict(enumerate(chains))
            policy = registry.make("eviction", policy, block_size=block_size, seed=0, oracle={}, future=future)
        assert not isinstance(policy, str)
        self.policy = Watched(policy)
        self.pool = BlockPool(num_blocks, block_size, self.policy)
        self.hits: list[int] = []
        for number, chain in enumerate(chains):
            owner = Request(number, number, len(chain) * block_size, 1)
            hit = self.pool.lookup(chain)
            self.pool.claim(hit, number, owner)
            held = [block.id for block in hit]
            held += self.pool.allocate(min(len(chain) - len(hit), self.pool.num_free), number)
            for depth in range(len(hit), len(held)):
                parent = chain[depth - 1] if depth else None
                self.pool.register(held[depth], chain[depth], depth, number, parent, owner)
            self.pool.release(held, number)
            self.pool.check([])
            self.hits.append(len(hit))


def single(string: Sequence[int]) -> list[Chain]:
    """Each reference a chain of one block: the classic setting."""
    return [(b"%d" % page,) for page in string]


def faults(string: Sequence[int], policy: str, frames: int) -> int:
    return len(string) - sum(Cache(single(string), policy, frames).hits)


# Textbook strings


@pytest.mark.parametrize(("policy", "expected"), [("fifo", 15), ("lru", 12), ("belady", 9)])
def test_the_textbooks_string_has_the_textbooks_page_faults(policy: str, expected: int) -> None:
    assert faults(SILBERSCHATZ, policy, 3) == expected


def test_with_more_memory_fifo_may_hit_less_and_lru_and_belady_do_not() -> None:
    assert [faults(ANOMALY, "fifo", frames) for frames in (3, 4)] == [9, 10]
    assert [faults(ANOMALY, "lru", frames) for frames in (3, 4)] == [10, 8]
    assert [faults(ANOMALY, "belady", frames) for frames in (3, 4)] == [7, 6]


strings = st.lists(st.integers(0, 9), max_size=120)
skewed = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 15)), max_size=150)


@given(strings, st.integers(1, 6))
def test_lru_and_belady_never_hit_less_with_more_memory(string: list[int], frames: int) -> None:
    for policy in ("lru", "belady"):
        assert faults(string, policy, frames + 1) <= faults(string, policy, frames)


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


# Slow references: a list of pages that is searched from one end to the other for every victim


def by_key(key: Callable[[dict[str, int], float], Any]) -> Callable[[Sequence[int], int], int]:
    """Faults of a cache that evicts the page with the least `key(page, L)`; L is the key of the last victim."""

    def count(string: Sequence[int], frames: int) -> int:
        cached: dict[int, dict[str, int]] = {}
        ever: dict[int, int] = {}
        inflation, missed = 0.0, 0
        for now, page in enumerate(string):
            if page not in cached:
                missed += 1
                if len(cached) == frames:
                    victim = min(cached, key=lambda p: (cached[p]["rank"], cached[p]["last"]))
                    inflation = cached[victim]["rank"]
                    del cached[victim]
                cached[page] = {"entered": now, "hits": 0, "ever": ever.get(page, 0)}
            else:
                cached[page]["hits"] += 1
            ever[page] = ever.get(page, 0) + 1
            cached[page]["last"] = now
            cached[page]["rank"] = key(cached[page], inflation)
        return missed

    return count


def arc_faults(string: Sequence[int], frames: int, *, room_first: bool = True) -> int:
    """ARC as the paper has it, on plain lists (oldest first); `room_first`: it evicts before it knows of ghosts."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, missed = 0.0, 0

    def replace(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p) or not t2):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for page in string:
        if page in t1 or page in t2:
            (t1 if page in t1 else t2).remove(page)
            t2.append(page)
            continue
        missed += 1
        full = len(t1) + len(t2) == frames
        if room_first and full:
            replace(False)
        if page in b1:
            p = min(frames, p + max(1, len(b2) / len(b1)))
            if not room_first and full:
                replace(False)
            b1.remove(page)
            t2.append(page)
        elif page in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            if not room_first and full:
                replace(True)
            b2.remove(page)
            t2.append(page)
        else:
            if not room_first and full:
                if len(t1) == frames:
                    t1.pop(0)
                else:
                    if len(t1) + len(b1) == frames:
                        b1.pop(0)
                    elif len(t1) + len(t2) + len(b1) + len(b2) == 2 * frames:
                        b2.pop(0)
                    replace(False)
            t1.append(page)
            if len(t1) + len(b1) > frames:
                b1.pop(0)
            if len(t1) + len(t2) + len(b1) + len(b2) > 2 * frames:
                b2.pop(0)
        assert len(t1) + len(t2) <= frames
    return missed


def s3_fifo_faults(string: Sequence[int], frames: int) -> int:
    """Algorithm 1 of the paper, on plain lists (tail first)."""
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    hits: dict[int, int] = {}
    missed = 0

    def evict() -> None:
        while True:
            if small and (len(small) >= 0.1 * frames or not main):
                page = small.pop(0)
                if hits[page] <= 1:
                    ghosts.append(page)
                    del ghosts[: max(0, len(ghosts) - int(0.9 * frames))]
                    return
                main.append(page)
                hits[page] = 0
            else:
                page = main.pop(0)
                if hits[page] == 0:
                    return
                main.append(page)
                hits[page] -= 1

    for page in string:
        if page in small or page in main:
            hits[page] = min(hits[page] + 1, 3)
            continue
        missed += 1
        if len(small) + len(main) == frames:
            evict()
        hits[page] = 0
        if page in ghosts:
            ghosts.remove(page)
            main.append(page)
        else:
            small.append(page)
    return missed


SLOW: dict[str, Callable[[Sequence[int], int], int]] = {
    "lru": by_key(lambda page, L: 0),
    "fifo": by_key(lambda page, L: page["entered"]),
    "lfu": by_key(lambda page, L: page["hits"]),
    "lfu,remember=true": by_key(lambda page, L: page["hits"] + page["ever"]),
    "slru": by_key(lambda page, L: page["hits"] >= 2),
    "gdsf": by_key(lambda page, L: L + 1 + page["hits"]),
    "gdsf,remember=true": by_key(lambda page, L: L + 1 + page["hits"] + page["ever"]),
    "arc": arc_faults,
    "s3_fifo": s3_fifo_faults,
}


@pytest.mark.parametrize("policy", SLOW)
@settings(max_examples=40, deadline=None)
@given(skewed, st.integers(1, 8))
def test_a_policy_hits_what_its_slow_reference_hits(policy: str, string: list[int], frames: int) -> None:
    assert faults(string, policy, frames) == SLOW[policy](string, frames)


@pytest.mark.parametrize("policy", SLOW)
def test_a_policy_hits_what_its_slow_reference_hits_on_a_long_string(policy: str) -> None:
    string = zipf_string(4000, 200)
    for frames in (10, 40):
        assert faults(string, policy, frames) == SLOW[policy](string, frames)


def zipf_string(length: int, pages: int) -> list[int]:
    """Popular pages with a scan over all of them now and then; the same each time."""
    draw = RandomStream(7, "zipf").uniform_array(list(range(length)))
    string = [int(pages**u) - 1 for u in draw.tolist()]
    for at in range(500, length, 1000):
        string[at : at + pages // 2] = range(pages // 2)
    return string


def test_making_room_before_looking_for_ghosts_costs_arc_next_to_nothing() -> None:
    string = zipf_string(6000, 400)
    for frames in (20, 60, 150):
        ours, papers = faults(string, "arc", frames), arc_faults(string, frames, room_first=False)
        assert abs(ours - papers) < 0.01 * len(string)
        assert ours < faults(string, "lru", frames)


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


# Chains

TREE = [tuple(block_keys(tokens, 1)) for n in (1, 3, 5, 8) for tokens in itertools.islice(
    ([a] * min(n, 3) + [b] * max(0, n - 3) for a in range(3) for b in range(4)), 12)]  # fmt: skip
"""Chains of 1 to 8 blocks that share heads of up to three."""

MIXED = [TREE[i] for i in RandomStream(3, "mixed").uint64_array(list(range(60))) % len(TREE)]

chains = st.lists(st.sampled_from(TREE), max_size=60)


def orphans(cache: Cache, served: Sequence[Chain]) -> int:
    """Blocks in the pool that stand behind a gap."""
    reachable = {block.key for chain in served for block in cache.pool.lookup(chain)}
    return len(cache.pool._index.keys() - reachable)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20, deadline=None)
@given(chains, st.integers(8, 24))
def test_every_cached_block_can_be_found(policy: str, served: list[Chain], num_blocks: int) -> None:
    assert orphans(Cache(served, policy, num_blocks), served) == 0


@pytest.mark.parametrize(
    ("policy", "needs_help"),
    [("fifo", True), ("gdsf,crossover=1", True), ("lfu", False), ("gdsf", False), ("slru", False)],
)
def test_which_policies_would_leave_blocks_that_nobody_finds(policy: str, needs_help: bool) -> None:
    """A count of hits never puts a parent before its child; an age or a cost may."""

    def may_evict_anywhere() -> Eviction:
        made = registry.make("eviction", policy, block_size=1)
        made._idle.leaves_only = False
        return made  # type: ignore[no-any-return]

    lost = [orphans(Cache(MIXED[:n], may_evict_anywhere(), 14), MIXED) for n in range(len(MIXED))]
    assert (max(lost) > 0) is needs_help


class IdleBlocksAgainstAList(RuleBasedStateMachine):
    """The reference looks through all idle blocks for every question."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = IdleBlocks(segments=2)
        self.slow: list[tuple[int, int, int, CachedBlock]] = []  # segment, rank, number, block
        self.count = 0

    @rule(chain=st.integers(0, 2), depth=st.integers(0, 4), rank=st.integers(0, 3), segment=st.integers(0, 1))
    def add(self, chain: int, depth: int, rank: int, segment: int) -> None:
        key, parent = b"%d.%d" % (chain, depth), b"%d.%d" % (chain, depth - 1) if depth else None
        if all(block.key != key for *_, block in self.slow):
            self.count += 1
            block = CachedBlock(self.count, key, depth, parent)
            self.fast.add(block, rank, segment)
            self.slow.append((segment, rank, self.count, block))

    @precondition(lambda self: self.slow)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.slow))
        assert self.fast.discard(entry[3])
        assert not self.fast.discard(entry[3])
        self.slow.remove(entry)

    @rule(segment=st.integers(0, 1))
    def pop(self, segment: int) -> None:
        parents = {block.parent for *_, block in self.slow}
        ends = [e for e in self.slow if e[0] == segment and e[3].key not in parents]
        popped = self.fast.pop(segment)
        if not ends:
            assert popped is None
        else:
            first = min(ends, key=lambda e: (e[1], e[2]))
            assert popped == (first[1], first[3])
            self.slow.remove(first)
        assert len(self.fast) == len(self.slow)
        assert [self.fast.size(s) for s in (0, 1)] == [sum(e[0] == s for e in self.slow) for s in (0, 1)]


TestIdleBlocks = IdleBlocksAgainstAList.TestCase
TestIdleBlocks.settings = settings(max_examples=75, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", [name for name in registry.names("eviction") if name != "lru"])
def test_a_cache_that_is_hit_for_ever_and_never_full_does_not_grow(policy: str) -> None:
    cache = Cache([TREE[-1], TREE[-5]] * 400, policy, 40)
    idle: Any = cache.policy.inner
    assert sum(map(len, idle._idle._heaps)) <= 2 * len(idle._idle) + 65
    if policy == "belady":
        assert len(idle._due) <= 16


# Policies that are another one


def victims(policy: str, served: Sequence[Chain], num_blocks: int) -> list[bytes]:
    return Cache(served, policy, num_blocks).policy.victims


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


def test_remembered_counts_outlive_their_blocks() -> None:
    string = [0, 0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 3, 3, 0, 4, 4, 0]
    assert faults(string, "lfu,remember=true", 2) == SLOW["lfu,remember=true"](string, 2)
    assert faults(string, "lfu,remember=true", 2) < faults(string, "lfu", 2)


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


NO_ORACLE = [name for name in registry.names("eviction") if name != "belady"]


@settings(max_examples=30, deadline=None)
@given(jobs(), st.dictionaries(st.integers(0, 40), st.sampled_from(NO_ORACLE).map(lambda name: _change(eviction=name))))
def test_any_policy_may_be_put_in_place_of_any_other_while_requests_run(work: list[Job], acts: dict[int, Any]) -> None:
    drive = Operated(Limits(28, 4, 6, 32, 110), StackSpec(eviction="arc"), work, acts)
    assert drive.plane.view.num_free_blocks + sum(r.num_blocks for r in drive.requests) == 28
    for i, job in enumerate(work):
        if drive.status(i) in ("stop", "length"):
            assert drive.output_tokens(i) == job.output


def test_belady_is_refused_where_nobody_knows_the_future() -> None:
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        StackSpec(eviction="belady").build()
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        StackSpec().rebuilt({"eviction": "belady"})
    assert StackSpec(eviction="belady").build(future={}).clairvoyant
    assert StackSpec(eviction="belady").wants_future
    assert not StackSpec(eviction="arc").wants_future


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
