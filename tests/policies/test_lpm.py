"""Longest prefix match: the order by a slow reference, what is put off, and when it is first come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Hit, RankedQueue
from policies.plan import Mode, Plan
from policies.prefix import block_keys, hit_tokens
from policies.queues.lpm import Lpm
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import Drive, Job

SIZE = 4
ALONE = Limits(400, SIZE, 1, 200, 200)


def job(prefix: int, shared: int, own: int, arrives: int = 0, output: int = 3) -> Job:
    """A prompt that begins with so many tokens of a prefix, and goes on with its own."""
    job.count += 1  # type: ignore[attr-defined]
    tokens = [prefix] * shared + [1000 + job.count] * (own + output)  # type: ignore[attr-defined]
    return Job(shared + own, output, arrives, keys=tuple(block_keys(tokens, SIZE)))


job.count = 0  # type: ignore[attr-defined]


def admitted(limits: Limits, queue: str, work: list[Job]) -> list[list[int]]:
    return [d.admitted for d in decisions(Drive(limits, StackSpec(queue=queue), work)) if d.admitted]


def test_who_has_the_longest_hit_goes_first_and_of_equal_ones_who_came_first() -> None:
    """Job 0 leaves 40 tokens of prefix 7: of those that come meanwhile, hits of 0, 16, 40 and 16 tokens."""
    work = [job(7, 40, 8), *(job(7, shared, 48 - shared, arrives=1) for shared in (0, 17, 40, 19))]
    assert admitted(ALONE, "lpm", work) == [[0], [3], [2], [4], [1]]
    assert admitted(ALONE, "fcfs", work) == [[0], [1], [2], [3], [4]]


def test_who_shares_a_prefix_to_come_is_put_off_and_hits_it() -> None:
    """Two of four share 40 tokens that nobody has computed. In one step they would each compute them."""
    work = [job(7, 40, 8), job(7, 40, 8), job(1, 40, 8), job(2, 40, 8)]
    limits = Limits(400, SIZE, 4, 144, 200)  # three prompts a step
    assert admitted(limits, "lpm", work) == [[0, 2, 3], [1]]
    assert admitted(limits, "lpm,defer_hit=-1", work) == [[0, 1, 2], [3]]
    cached = {q: [r.num_cached_tokens for r in Drive(limits, StackSpec(queue=q), work).requests]
              for q in ("lpm", "lpm,defer_hit=-1", "fcfs")}  # fmt: skip
    assert cached == {"lpm": [0, 40, 0, 0], "lpm,defer_hit=-1": [0, 0, 0, 0], "fcfs": [0, 0, 0, 0]}


@pytest.mark.parametrize(("shared", "put_off"), [(31, False), (32, True), (35, True)])
def test_only_who_has_32_tokens_in_common_is_put_off(shared: int, put_off: bool) -> None:
    work = [job(7, shared, 40 - shared), job(7, shared, 40 - shared), job(1, 40, 0)]
    assert order(queue_of(work), draft(work, [])) == ([0, 2, 1] if put_off else [0, 1, 2])


def test_who_has_a_hit_beyond_32_tokens_is_not_put_off_and_puts_nobody_off() -> None:
    work = [job(7, 60, 4), job(7, 60, 4), job(1, 40, 8)]
    queue = queue_of(work)
    cached = [list(work[0].keys[: n // SIZE]) for n in (32, 36)]
    assert order(queue, draft(work, [cached[0]])) == [0, 2, 1]
    assert order(queue, draft(work, [cached[1]])) == [0, 1, 2]


# Beside the queue alone


@pytest.mark.parametrize("queue", ["lpm", "dlpm"])
def test_what_a_swapped_request_brings_back_is_no_hit(queue: str) -> None:
    """It has 20 tokens on the host, and none in the cache, where the other finds 8."""
    desk, keys = Desk(Limits(12, 4, 4, 64, 40, num_host_blocks=6)), tuple(block_keys([1] * 12, 4))
    before, swapped, other = desk.submit(9, keys=keys), desk.submit(20), desk.submit(3)
    desk.run(Plan(chunks=[(before, 9), (swapped, 20), (other, 3)]), before)
    desk.run(Plan(preempt=[(swapped, Mode.SWAP)], decodes=[other]))
    waiting = desk.submit(12, keys=keys)
    view = desk.plane.view
    assert [(view.probe(r).num_tokens, hit_tokens(r, view)) for r in (swapped, waiting)] == [(20, 0), (8, 8)]
    ordered = registry.make("queue", queue, block_size=4)
    ordered.push(swapped, 0)
    ordered.push(waiting, 0)
    ordered.begin(view.draft(), 0)
    assert ordered.peek(0) is waiting


class Caches:
    """What a queue sees of a replica whose cache holds these chains of keys, and how often it looked."""

    block_size = SIZE

    def __init__(self, work: list[Job], chains: Sequence[Sequence[bytes]]) -> None:
        self._work, self._cached = work, {key for chain in chains for key in chain}
        self.probes = 0

    def prefix_keys(self, request: Request) -> Sequence[bytes]:
        return self._work[request.id].keys[: request.num_prompt_tokens // SIZE]

    def probe(self, request: Request) -> Hit:
        self.probes += 1
        hit = 0
        for key in self._work[request.id].keys[: (request.num_tokens - 1) // SIZE]:
            if key not in self._cached:
                break
            hit += SIZE
        return Hit(hit)


def draft(work: list[Job], chains: Sequence[Sequence[bytes]], seqs_left: int = 1) -> Any:
    return SimpleNamespace(view=Caches(work, chains), seqs_left=seqs_left)


def queue_of(work: list[Job], knobs: str = "") -> Lpm:
    queue: Lpm = registry.make("queue", f"lpm{knobs}")
    for i, one in enumerate(work):
        queue.push(Request(i, one.arrives, one.prompt, 1), 0)
    return queue


def order(queue: Lpm, step: Any) -> list[int]:
    """The whole queue as this step would take it; it is as before afterwards."""
    queue.begin(step, 0)
    taken = []
    while queue.peek(0) is not None:
        taken.append(queue.pop(0))
    for request in taken:
        queue.push(request, 0)
    return [request.id for request in taken]


def common(a: list[int], b: list[int]) -> int:
    """Tokens in common at the front, in whole blocks."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same // SIZE * SIZE


PROMPTS = st.lists(
    st.lists(st.sampled_from([(0, 9), (1, 9), (0, 3), (1, 20)]), min_size=1, max_size=4).map(
        lambda runs: [token for token, length in runs for _ in range(length)]
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(PROMPTS, PROMPTS, st.sampled_from([0, 8, 16, 32]), st.sampled_from([1, 8, 16, 30]))
def test_the_order_is_that_of_a_comparison_of_all_prompts_token_by_token(
    prompts: list[list[int]], cached: list[list[int]], defer_hit: int, defer_shared: int
) -> None:
    work = [Job(len(p), 1, i // 2, keys=tuple(block_keys(p, SIZE))) for i, p in enumerate(prompts)]
    queue = queue_of(work, f",defer_hit={defer_hit},defer_shared={defer_shared}")
    hits = [max(common(p[:-1], c) for c in cached) for p in prompts]
    ahead: list[list[int]] = []
    put_off = set()
    for i, prompt in enumerate(prompts):
        if hits[i] <= defer_hit:
            if any(common(prompt, other) >= defer_shared for other in ahead):
                put_off.add(i)
            else:
                ahead.append(prompt)
    expected = sorted(range(len(prompts)), key=lambda i: (i in put_off, 0 if i in put_off else -hits[i], i))
    assert order(queue, draft(work, [block_keys(c, SIZE) for c in cached])) == expected


def test_with_more_waiting_than_are_looked_up_it_is_first_come_first_served_without_a_look() -> None:
    work = [job(7, shared, 48 - shared) for shared in (0, 16, 40, 24)]
    cached = [list(work[2].keys)]
    step = draft(work, cached)
    assert order(queue_of(work, ",max_waiting=4"), step) == [2, 3, 1, 0]
    assert step.view.probes == 4
    step = draft(work, cached)
    assert order(queue_of(work, ",max_waiting=3"), step) == [0, 1, 2, 3]
    assert step.view.probes == 0
    full = draft(work, cached, seqs_left=0)
    queue = queue_of(work)
    queue.begin(draft(work, cached), 0)
    queue.begin(full, 0)
    assert queue.pop(0).id == 0  # the last step's order is forgotten
    queue_of(work[:1]).begin(step, 0)
    assert full.view.probes == step.view.probes == 0  # nobody can be admitted, or there is nothing to order


def test_of_a_step_s_order_those_are_left_out_that_have_gone_and_those_that_come_are_last() -> None:
    work = [job(7, shared, 48 - shared) for shared in (0, 16, 40, 44)]
    queue = queue_of(work[:3])
    queue.begin(draft(work, [work[3].keys]), 0)
    queue.push(Request(3, 0, 48, 1), 0)
    assert queue.pop(0).id == 2
    queue.remove(Request(1, 0, 48, 1))
    assert [queue.pop(0).id for _ in range(2)] == [0, 3]
    with pytest.raises(IndexError):
        queue.pop(0)


# Where it is first come, first served

WORK = st.lists(
    st.builds(job, st.integers(1, 2), st.integers(0, 40), st.integers(1, 20), st.integers(0, 20), st.integers(1, 20)),
    min_size=1,
    max_size=10,
)
SMALL = st.sampled_from([18, 30, 400])


@settings(max_examples=20, deadline=None)
@given(WORK, SMALL, st.sampled_from([0, 1]), st.sampled_from(["mixed", "sglang", "prefill_first"]))
def test_without_prefix_caching_it_is_first_come_first_served(
    work: list[Job], blocks: int, lag: int, scheduler: str
) -> None:
    limits = Limits(blocks, SIZE, 3, 64, 90, prefix_caching=False, lag=lag)
    assert_same_run(limits, work, StackSpec(scheduler, "lpm"), StackSpec(scheduler, "fcfs"))


@settings(max_examples=15, deadline=None)
@given(WORK, st.sampled_from([0, 1]), st.sampled_from(["mixed", "sglang"]))
def test_where_no_two_prompts_have_anything_in_common_it_is_first_come_first_served(
    work: list[Job], lag: int, scheduler: str
) -> None:
    distinct = [
        Job(one.prompt, one.output, one.arrives, keys=tuple(block_keys([i] * (one.prompt + one.output), SIZE)))
        for i, one in enumerate(work)
    ]
    limits = Limits(400, SIZE, 3, 64, 90, lag=lag)
    assert_same_run(limits, distinct, StackSpec(scheduler, "lpm"), StackSpec(scheduler, "fcfs"))


def test_it_says_nothing_about_requests_that_run() -> None:
    assert not isinstance(registry.make("queue", "lpm"), RankedQueue)
    with pytest.raises(PolicyError, match="orders running requests too"):
        StackSpec("preemptive", "lpm").build(block_size=SIZE)


@pytest.mark.parametrize("knobs", ["max_waiting=-1", "defer_hit=-2", "defer_shared=0"])
def test_knobs_that_make_no_sense_are_refused(knobs: str) -> None:
    with pytest.raises(PolicyError, match="max_waiting must be 0 or more"):
        registry.make("queue", f"lpm,{knobs}")
