"""Deficit round robin and deficit longest prefix match, by hand and against slow references."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Hit
from policies.prefix import block_keys
from policies.queues.dlpm import Dlpm
from policies.queues.drr import Drr
from policies.queues.vtc import Vtc
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from policies.tenant_queue import SCALE, TenantQueue
from tests.policies.decisions import decisions, outcomes
from tests.policies.fairness import M, U, Watched, jobs
from tests.policies.harness import Drive, Job


def admitted(queue: TenantQueue, requests: list[tuple[str, int]], count: int) -> str:
    """The tenants of the first admissions, where nothing is charged but input."""
    for i, (tenant, size) in enumerate(requests):
        queue.push(Request(i, i, size, 1, tenant=tenant), 0)
    return "".join(queue.pop(0).tenant for _ in range(count))


def test_deficit_round_robin_by_hand() -> None:
    """Quantum 500, requests of 600 (a) and 300 (b): a 500 -100 | b 500 200 -100 | a 400 -200 | b 400 100 -200 |
    a 300 -300 | b 300 0 | a 200 -400 | b 500 200 -100 | a 100 -500 | b 400 100 -200 | (a 0 passes) b 300 0 | a 500."""
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    order = admitted(queue, [("a", 600), ("b", 300)] * 12, 14)
    assert order == "abbabbababbabb"
    assert [queue.pop(0).tenant for _ in range(2)] == ["b", "a"]
    assert queue.deficits == {"a": -100 * SCALE, "b": 0}


def test_a_request_that_does_not_fit_keeps_its_tenants_turn_without_another_quantum() -> None:
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    for i, (tenant, size) in enumerate([("a", 100), ("a", 100), ("b", 100)]):
        queue.push(Request(i, i, size, 1, tenant=tenant), 0)
    queue.pop(0)
    assert [queue.peek(0).tenant for _ in range(5)] == ["a"] * 5
    assert queue.deficits["a"] == 400 * SCALE
    queue.charge("a", 400 * SCALE)  # its running request spends the rest
    assert queue.peek(0).tenant == "b"
    assert queue.deficits == {"a": 0, "b": 500 * SCALE}


def test_a_tenant_that_left_with_something_to_spend_gets_no_quantum_on_top_of_it() -> None:
    queue = registry.make("queue", "drr,quantum=500,output_weight=0")
    for i in range(2):
        queue.push(Request(i, i, 100, 1, tenant="a"), 0)
        queue.pop(0)
    assert queue.deficits == {"a": 300 * SCALE}


class EveryRound(Drr):
    """One round after the other."""

    def _skip_rounds(self) -> None:
        """None is skipped."""


class EveryHead(Dlpm):
    """Looks at every tenant in turn."""

    def _first_open(self) -> Request | None:
        heads = [self.head(tenant) for tenant in self._waiting if self.deficits[tenant] > 0]
        return min((head for head in heads if head is not None), key=lambda head: head.key, default=None)


class EveryCounter(Vtc):
    """Looks at every tenant in turn."""

    def choose(self, now: int) -> Request | None:
        heads = [(self.counters.get(tenant, 0), self.head(tenant)) for tenant in self._waiting]
        return min(((c, h.key, h) for c, h in heads if h is not None), default=(0, (0, 0), None))[2]


@pytest.mark.parametrize(
    ("queue", "slow"),
    [
        ("drr,quantum=1", lambda: EveryRound(1)),
        ("drr,quantum=20", lambda: EveryRound(20)),
        ("dlpm,quantum=1", lambda: EveryHead(1)),
        ("dlpm,quantum=20", lambda: EveryHead(20)),
        ("vtc", EveryCounter),
        ("vtc,predictor=declared", lambda: EveryCounter(predictor="declared")),
    ],
)
@settings(max_examples=8, deadline=None)
@given(jobs("abcd", cancels=True), st.sampled_from([24, 400]), st.booleans())
def test_what_saves_time_changes_no_decision(
    queue: str, slow: Callable[[], TenantQueue], work: list[Job], num_blocks: int, caching: bool
) -> None:
    class Slow(Drive):
        def _deliver(self, now: int) -> None:
            if self.plane.next_step == 0:
                self.stack.scheduler.queue = slow()  # type: ignore[attr-defined]
            super()._deliver(now)

    for job in work:
        job.keys = tuple(block_keys([len(job.tenant)] * job.prompt, 4))
    limits = Limits(num_blocks, 4, 6, 32, 400, prefix_caching=caching)
    fast, reference = Drive(limits, StackSpec(queue=queue), work), Slow(limits, StackSpec(queue=queue), work)
    assert decisions(fast) == decisions(reference)
    assert outcomes(fast) == outcomes(reference)


def offer(queue: Any, hits: dict[int, int]) -> None:
    view = SimpleNamespace(
        running={}, num_blocks=1000, block_size=4, probe=lambda request: Hit(hits.get(request.id, 0))
    )
    queue.begin(SimpleNamespace(view=view, seqs_left=9), 0)


def test_the_longest_match_of_those_who_have_not_spent_their_quantum_goes_first() -> None:
    queue = registry.make("queue", "dlpm,quantum=50,output_weight=0")
    for i, tenant in enumerate("aaabbc"):
        queue.push(Request(i, i, 100, 1, tenant=tenant), 0)
    offer(queue, {1: 80, 2: 40, 3: 60, 4: 60})
    order = []
    for _ in range(6):
        order.append(queue.pop(0).id)
    # 1 (80 of a: 50 - 20 = 30 left), 3 (of b, 60, earlier than 4; 10 left), 4 (b: -30), 2 (a: 30 - 60 = -30),
    # 5 (c, without a hit: -50). Then all refill: a alone waits, and has 20.
    assert order == [1, 3, 4, 2, 5, 0]
    assert queue.deficits == {"a": (20 - 100) * SCALE, "b": 20 * SCALE, "c": 0}


def test_a_match_however_long_waits_while_its_tenant_has_spent_its_quantum() -> None:
    queue = registry.make("queue", "dlpm,quantum=15,output_weight=0")
    for i, tenant in enumerate("aabb"):
        queue.push(Request(i, i, 100, 1, tenant=tenant), 0)
    offer(queue, {0: 80, 1: 80, 2: 60})
    # 0 (a: 15 - 20 = -5), 2 (b: 15 - 40 = -25), one refill (a: 10, b: -10), 1 (a: -10), one more (a: 5, b: 5), 3
    assert [queue.pop(0).id for _ in range(4)] == [0, 2, 1, 3]
    assert queue.deficits == {"a": 5 * SCALE, "b": (5 - 100) * SCALE}


def test_only_the_first_of_each_tenant_are_looked_up() -> None:
    queue = registry.make("queue", "dlpm,window=4")
    looked: list[int] = []
    for i in range(40):
        queue.push(Request(i, i, 10, 1, tenant="ab"[i % 2]), 0)

    class Hits(dict):
        def get(self, key: int, default: int = 0) -> int:
            looked.append(key)
            return default

    offer(queue, Hits())
    queue.peek(0)
    assert looked == [0, 2, 1, 3]
    assert [queue.pop(0).id for _ in range(6)] == [0, 1, 2, 3, 4, 5]


def documents(tenant: str, count: int) -> list[Job]:
    """Requests about four documents, two to each in turn."""
    made = []
    for i in range(count):
        tokens = [ord(tenant) * 10 + i // 2 % 4] * 48 + [1000 + i] * 8
        made.append(Job(56, 4, tenant=tenant, keys=tuple(block_keys(tokens, 4))))
    return made


class Extending(Watched):
    """Input counts without what the cache had."""

    def num_input(self, request: Request) -> int:
        return request.num_prompt_tokens - request.num_cached_tokens


def test_longest_match_computes_less_than_counters_and_stays_within_its_bound() -> None:
    work = [job for pair in zip(documents("a", 40), documents("b", 40), strict=True) for job in pair]
    limits = Limits(M // 4, 4, 2, 64, 110)
    vtc, dlpm = (Extending(limits, queue, work, admission="reserve_max") for queue in ("vtc", "dlpm,quantum=200"))
    assert dlpm.service().total() < 0.9 * vtc.service().total()
    assert dlpm.largest_difference("a", "b") <= 2 * (U + 200)
    for tenant, spent in dlpm.service().items():
        quanta, left = divmod(dlpm.queue.deficits[tenant] + SCALE * spent, 200 * SCALE)
        assert quanta > 1
        assert left == 0, "what was given in all is whole quanta"
