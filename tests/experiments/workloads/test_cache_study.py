"""Studying a cache: figures that can be counted by hand, and those of a public trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.eviction import EARLIER, SIZES, all_policies, anywhere, measure_cost
from experiments.cache_study import study_cache, study_workload
from experiments.workloads import Workload
from experiments.workloads.block_keys import trace_chains
from experiments.workloads.loaders import load
from policies.registry import PolicyError

CONVERSATION = "mooncake/conversation_trace.jsonl.gz"


def test_hits_are_counted_in_blocks_in_tokens_and_by_request() -> None:
    # The second request hits two blocks of four, of which it has 7 tokens in all; the third one block.
    chains = [(b"a", b"ab", b"abc"), (b"a", b"ab"), (b"a", b"ax", b"axy")]
    hits = study_cache(chains, "lru", None, block_size=4, lengths=[12, 7, 10])
    assert (hits.blocks, hits.hit_blocks, hits.tokens, hits.hit_tokens) == (8, 3, 29, 11)
    assert hits.block_ratio == 3 / 8
    assert hits.token_ratio == 11 / 29
    assert hits.mean_request == pytest.approx((0 + 1 + 4 / 10) / 3)
    assert hits.evictions == 0
    assert study_cache(chains, "lru", 3, block_size=4).evictions == 2


def test_a_chain_longer_than_the_cache_is_kept_as_far_as_it_fits() -> None:
    chain = [b"%d" % n for n in range(6)]
    assert study_cache([chain, chain], "lru", 4).hit_blocks == 4


def test_what_cannot_be_studied_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        study_cache([[b"a"]], "lru", 0)
    with pytest.raises(ValueError, match="1 lengths for 2 chains"):
        study_cache([[b"a"], [b"b"]], "lru", 1, lengths=[4])
    with pytest.raises(PolicyError, match="there is no eviction"):
        study_cache([[b"a"]], "lur", 1)
    with pytest.raises(ValueError, match="no prefix blocks"):
        trace_chains(Workload.build([0], [5], [5]))


def test_chains_have_a_key_for_every_block_of_the_trace() -> None:
    workload = Workload.build([0, 1, 2], [10, 9, 4], [1, 1, 1], hash_ids=[(1, 2, 3), (1, 2, 4), (2,)], hash_block=4)
    one, two, three = trace_chains(workload)
    assert [len(one), len(two), len(three)] == [3, 3, 1]
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    assert three[0] not in one  # the same id, but not behind the same prefix


# Mooncake's traces


@pytest.fixture(scope="module")
def conversation(trace: Callable[[str], Path]) -> Workload:
    return load(trace(CONVERSATION))


def test_an_infinite_cache_hits_the_conversation_trace_as_published(conversation: Workload) -> None:
    (hits,) = study_workload(conversation, ["lru"], [None])
    assert (hits.requests, hits.blocks, hits.blocks - hits.hit_blocks) == (12_031, 288_500, 182_790)
    assert f"{hits.block_ratio:.4f} {hits.token_ratio:.4f} {hits.mean_request:.4f}" == "0.3664 0.3736 0.4094"
    assert hits.evictions == 0


def test_an_infinite_cache_hits_the_synthetic_trace_as_published(trace: Callable[[str], Path]) -> None:
    (hits,) = study_workload(load(trace("mooncake/synthetic_trace.jsonl.gz")), ["lru"], [None])
    assert f"{hits.block_ratio:.4f} {hits.token_ratio:.4f} {hits.mean_request:.4f}" == "0.6396 0.6512 0.4315"


@pytest.mark.parametrize(("num_blocks", "tokens"), [(500, 0.043), (5_000, 0.114), (20_000, 0.294), (50_000, 0.362)])
def test_lru_hits_the_share_of_tokens_that_others_counted(
    num_blocks: int, tokens: float, conversation: Workload
) -> None:
    (hits,) = study_workload(conversation, ["lru"], [num_blocks])
    assert hits.token_ratio == pytest.approx(tokens, abs=0.0006)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("agents/miniswe_blk16.jsonl.gz", (0.782, 0.933, 0.934)),
        ("agents/magagent_blk16.jsonl.gz", (0.767, 0.842, 0.842)),
    ],
)
def test_lru_hits_in_traces_of_agents_what_others_counted(
    name: str, tokens: tuple[float, ...], trace: Callable[[str], Path]
) -> None:
    hits = study_workload(load(trace(name)), ["lru"], [1_000, 5_000, None])
    assert [row.token_ratio for row in hits] == pytest.approx(tokens, abs=0.0006)


def test_the_earlier_figures_are_those_of_policies_that_evict_anywhere_or_remember(conversation: Workload) -> None:
    size = 10_000
    at = SIZES.index(size)
    fifo = anywhere("fifo", conversation.hash_block)
    assert fifo is not None
    hits = study_workload(
        conversation, ["lru", "belady", ("fifo anywhere", fifo), "fifo", "lfu,remember=true", "lfu"], [size]
    )
    ratio = {row.eviction: row.block_ratio for row in hits}
    assert ratio["lru"] == pytest.approx(EARLIER["lru"][at], abs=0.0005)
    assert ratio["belady"] == pytest.approx(EARLIER["belady"][at], abs=0.0005)
    assert ratio["fifo anywhere"] == pytest.approx(EARLIER["fifo"][at], abs=0.0005)
    assert ratio["lfu,remember=true"] == pytest.approx(EARLIER["lfu"][at], abs=0.0005)
    assert ratio["fifo"] > ratio["fifo anywhere"] + 0.02  # leaves alone
    assert ratio["lfu"] < ratio["lfu,remember=true"] - 0.04


def test_lru_hits_more_with_more_memory(conversation: Workload) -> None:
    some = conversation.slice(3_000)
    ratios = [row.block_ratio for row in study_workload(some, ["lru"], [250, 500, 1_000, 2_000, 4_000, 8_000, None])]
    assert ratios == sorted(ratios)
    assert len(set(ratios)) > 4


@pytest.mark.parametrize("policy", all_policies())
def test_every_policy_is_timed_and_hits_no_more_than_an_infinite_cache(policy: str) -> None:
    cost = measure_cost(policy, 320, samples=64)
    assert min(cost.idle_us, cost.hit_us, cost.victim_us) > 0
    draw = np.random.default_rng(1)
    chains = [[b"%d" % n for n in range(draw.integers(1, 9))] + [b"own%d" % i] for i in range(60)]
    most = study_cache(chains, "lru", None).hit_blocks
    assert 0 < study_cache(chains, policy, 20).hit_blocks <= most
