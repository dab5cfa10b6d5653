"""Splitwise, DistServe and Mooncake on replicas with set figures: who gets what, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import LATER, Route
from policies.request import Request, Slo
from tests.policies.fleet import Loaded, PerBlock, PerToken, chain, make_router, prompt

# Splitwise


def test_splitwise_sends_prompts_where_fewest_tokens_are_pending_and_decodes_where_least_memory_is_promised() -> None:
    router = make_router("splitwise,prefill=2")
    fleet = [Loaded(0, num_prefill_tokens=90, num_outstanding_tokens=90), Loaded(1), Loaded(2), Loaded(3)]
    assert router.route(prompt(0, 6), [], fleet, 0) == Route(1, 2)
    assert router.route(prompt(1, 4), [], fleet, 1) == Route(1, 3)
    assert router.route(prompt(2, 1), [], fleet, 2) == Route(1, 3)  # 4 blocks are promised there, 6 at replica 2
    router.on_end(prompt(0, 6), 1, 3)
    assert router.route(prompt(3, 1), [], fleet, 4) == Route(1, 2)
    fleet[2].num_free_blocks = 90  # 10 are in use by now
    assert router.route(prompt(4, 1), [], fleet, 5) == Route(1, 3)


def test_a_token_machine_takes_prompts_while_those_of_the_prompt_pool_have_too_long_queues_and_then_goes_back() -> None:
    """One prompt machine, two token machines; more than 100 tokens are too many where somebody waits."""
    router = make_router("splitwise,max_pending_tokens=100")
    fleet = [Loaded(i) for i in range(3)]

    def queue(machine: int, tokens: int) -> None:
        fleet[machine].num_waiting = int(tokens > 0)
        fleet[machine].num_prefill_tokens = fleet[machine].num_outstanding_tokens = tokens

    queue(0, 84)
    assert router.route(prompt(0), [], fleet, 0) == Route(0, 1)  # 84 + 16 = 100
    queue(0, 85)
    assert router.route(prompt(1), [], fleet, 1) == Route(2, 2)  # both phases: 1 has a decode pending and promised
    queue(2, 16)
    assert router.route(prompt(2), [], fleet, 2) == Route(2, 1)  # it is mixed now, and decodes have the other one
    queue(0, 0)
    assert router.route(prompt(3), [], fleet, 3) == Route(0, 1)  # there is room at home, but 2 still has a prompt
    queue(2, 0)
    assert router.route(prompt(4), [], fleet, 4) == Route(0, 2)  # it is a token machine again


def test_a_queue_of_one_long_prompt_is_not_too_long_as_long_as_nobody_waits() -> None:
    router = make_router("splitwise,max_pending_tokens=100")
    fleet = [Loaded(0, num_running=1, num_prefill_tokens=500, num_outstanding_tokens=500), Loaded(1)]
    assert router.route(prompt(0, 20), [], fleet, 0) == Route(0, 1)


def test_a_prompt_machine_takes_decodes_while_token_machines_are_full_and_then_goes_back() -> None:
    router = make_router("splitwise,prefill=2")
    fleet = [Loaded(i, num_blocks=10, num_free_blocks=10) for i in range(3)]
    fleet[0].num_free_blocks = 9
    assert router.route(prompt(0, 6), [], fleet, 0) == Route(0, 2)
    assert router.route(prompt(1, 4), [], fleet, 1) == Route(0, 1)  # 6 + 4 are all 10 blocks: full
    assert router.route(prompt(2, 3), [], fleet, 2) == Route(0, 2)  # 6 + 3 are not; 1 is mixed, and no prompt machine
    assert router.route(prompt(3, 2), [], fleet, 3) == Route(0, 1)
    router.on_end(prompt(1), 0, 4)
    router.on_end(prompt(3), 0, 4)
    fleet[0].num_prefill_tokens = fleet[0].num_outstanding_tokens = 1
    assert router.route(prompt(5, 1), [], fleet, 5) == Route(1, 1)  # it is home: prompts go there, and 2 is full


def test_without_a_machine_for_one_phase_both_run_where_fewest_tokens_are_pending() -> None:
    """Both pools have lent all that they have: the queues of all are too long, and memory is full."""
    router = make_router("splitwise,max_pending_tokens=10")
    fleet = [Loaded(i, num_waiting=1, num_prefill_tokens=50 - i, num_outstanding_tokens=50 - i) for i in range(3)]
    for replica in fleet:
        replica.num_free_blocks = 0
    assert router.route(prompt(0), [], fleet, 0) == Route(2, 0)  # each is lent to the other pool
    assert router.route(prompt(1), [], fleet, 1) == Route(2, 2)  # there is no prompt machine left to lend
    assert router.route(prompt(2), [], fleet, 2) == Route(1, 1)  # with that decode 2 has 49 pending too


MACHINES = st.lists(
    st.builds(
        lambda waiting, prefill, decoding, free: (waiting, prefill, decoding, free),
        st.integers(0, 2),
        st.integers(0, 120),
        st.integers(0, 5),
        st.integers(0, 20),
    ),
    min_size=4,
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(MACHINES, st.integers(1, 6)), min_size=1, max_size=8))
def test_a_phase_leaves_its_pool_only_if_the_best_machine_there_has_no_room(rounds: list) -> None:
    """Whatever the figures, and lent machines that have no work of the other kind are home."""
    router = make_router("splitwise,prefill=2,max_pending_tokens=100")
    sent: list[tuple[int, int]] = []
    for i, (figures, blocks) in enumerate(rounds):
        fleet = [
            Loaded(m, prefill + decoding, waiting, 0, free, 20, prefill)
            for m, (waiting, prefill, decoding, free) in enumerate(figures)
        ]
        counts = [sum(1 for to, _ in sent if to == m) for m in range(4)]
        memory = [max(sum(b for to, b in sent if to == m), 20 - fleet[m].num_free_blocks) for m in range(4)]
        pending = [
            f.num_prefill_tokens + max(f.num_outstanding_tokens - f.num_prefill_tokens, counts[f.id]) for f in fleet
        ]
        away = {m for m in router._mixed if (fleet[m].num_prefill_tokens if m >= 2 else counts[m])}
        route = router.route(prompt(i, blocks), [], fleet, i)
        sent.append((route.decode_replica, blocks))
        if route.replica == route.decode_replica:
            continue
        if route.replica >= 2 or route.replica in away:
            best = min((m for m in (0, 1) if m not in away), key=lambda m: pending[m], default=None)
            assert best is None or (fleet[best].num_waiting and pending[best] + 16 * blocks > 100)
        if route.decode_replica < 2 or route.decode_replica in away:
            assert all(memory[m] + blocks >= 20 for m in (2, 3) if m not in away)


# DistServe


def test_distserve_prefills_at_the_shortest_queue_and_says_later_who_decodes() -> None:
    router = make_router("distserve,prefill=3")
    fleet = [
        Loaded(0, num_waiting=2, num_running=1),
        Loaded(1, num_waiting=1, num_running=1, num_prefill_tokens=900),
        Loaded(2, num_waiting=1, num_running=1, num_prefill_tokens=500),
        Loaded(3),
    ]
    assert router.route(prompt(0), [], fleet, 0) == Route(2, LATER)


def test_a_decode_replica_accepts_while_few_blocks_wait_there_and_it_has_room() -> None:
    """0.05 of 100 blocks: 5 that wait are too many. The request has 33 tokens, with its first one: 3 blocks."""
    router = make_router("distserve,prefill=1")
    request = Request(0, 0, 32, 8)
    request._tokens = 33
    fleet = [Loaded(0), Loaded(1, num_free_blocks=3, num_incoming_blocks=4), Loaded(2, num_free_blocks=2)]
    assert router.pull(request, fleet, 0) == 1
    fleet[1].num_incoming_blocks = 5
    assert router.pull(request, fleet, 0) is None
    fleet[2].num_free_blocks = 90
    assert router.pull(request, fleet, 0) == 2
    fleet[1] = Loaded(1, num_free_blocks=95)
    assert router.pull(request, fleet, 0) == 1  # the fewest in use of those that accept


def test_without_decode_replicas_distserve_leaves_requests_where_they_are() -> None:
    router = make_router("distserve,prefill=2")
    assert router.route(prompt(0), [], [Loaded(1), Loaded(0)], 0) == Route(0)


# Mooncake: a token takes 1,000 ns, a block of 16 tokens 100 to fetch


def test_the_conductor_weighs_queue_transfer_and_prefill() -> None:
    """10 blocks, 8 of which replica 0 has: 32,000 ns there, 32,800 at replica 1 with the blocks fetched."""
    router, keys = make_router("mooncake,prefill=2"), chain("a", 10)
    fleet = [Loaded(0, cached=set(keys[:8])), Loaded(1), Loaded(2)]
    assert router.route(prompt(0, 10), keys, fleet, 0) == Route(0, 2)
    assert router.route(prompt(1, 10), keys, fleet, 0) == Route(1, 2, kv_from=0)  # 0 has 32,000 to do first
    assert router.route(prompt(2, 10), keys, fleet, 0) == Route(0, 2)  # 64,000; at 1 it is 64,800
    far = make_router("mooncake,prefill=2", transfer=PerBlock(10_000))
    assert [far.route(prompt(i, 10), keys, fleet, 0).replica for i in range(5)] == [0, 0, 0, 1, 0]  # 112,000 at 1


@pytest.mark.parametrize(("local", "threshold", "kv_from"), [(6, 1.5, None), (5, 1.5, 0), (6, 1, 0), (0, "none", None)])
def test_only_a_match_that_is_longer_than_the_own_one_by_the_threshold_is_fetched(
    local: int, threshold: object, kv_from: int | None
) -> None:
    """The best match is 8 blocks; replica 0, which has it, is busy for 960,000 ns."""
    router, keys = make_router(f"mooncake,prefill=2,threshold={threshold}"), chain("a", 10)
    fleet = [Loaded(0), Loaded(1, cached=set(chain("b", 60))), Loaded(2)]
    assert router.route(prompt(0, 60), chain("c", 60), fleet, 0) == Route(0, 2)
    fleet[0].cached, fleet[1].cached = set(keys[:8]), set(keys[:local])
    assert router.route(prompt(1, 10), keys, fleet, 0) == Route(1, 2, kv_from)


def test_of_a_queue_what_has_been_done_counts_no_more() -> None:
    """Prompts of 160,000 and 80,000 ns at replica 0, and of 208,000 at 1; each begins as the one before is done."""
    router, fleet = make_router("mooncake,prefill=2,reject=never"), [Loaded(i) for i in range(3)]
    long, other, short = prompt(0, 10), prompt(1, 13), prompt(2, 5)
    assert [router.route(r, [], fleet, 0).replica for r in (long, other, short)] == [0, 1, 0]
    long.first_scheduled_ns = other.first_scheduled_ns = 0
    # At 100,000: 60,000 + 80,000 are left at replica 0, 108,000 at 1.
    assert router.route(prompt(3, 1), [], fleet, 100_000).replica == 1
    # At 175,000: 65,000 of the second are left at 0, 49,000 at 1; then 65,000 at both.
    long.first_token_ns = short.first_scheduled_ns = 160_000
    assert [router.route(prompt(i, 1), [], fleet, 175_000).replica for i in (4, 5)] == [1, 0]
    router.on_end(short, 0, 180_000)
    assert router.route(prompt(6, 1), [], fleet, 180_000).replica == 0  # 16,000 are left there


def test_decodes_go_where_a_step_would_be_shortest() -> None:
    """By context, of which a token costs 2 ns, and by how many there are, of which each costs 1,000."""
    router = make_router("mooncake,prefill=1", cost=PerToken(1_000, 2))
    fleet = [Loaded(0), Loaded(1, num_free_blocks=60, num_running=1), Loaded(2, num_free_blocks=90, num_running=2)]
    # 1: 2 decodes and 41 blocks, 2,000 + 1,312. 2: 3 and 11, 3,000 + 352.
    assert router.route(prompt(0), [], fleet, 0) == Route(0, 1)
    fleet[1].num_running = 2  # 3 and 41, 3,000 + 1,312
    assert router.route(prompt(1), [], fleet, 0) == Route(0, 2)


def test_early_rejection_sees_those_that_decode_now_and_prediction_those_that_will() -> None:
    """A decode step takes 1,000 ns for each: 3 at most. Prompts take 16,000 each, one after another."""
    fleet = [Loaded(0), Loaded(1)]

    def served(reject: str) -> list[bool]:
        router = make_router(f"mooncake,reject={reject},tbt_ms=0.003,decode_ms=0.1")
        return [router.route(prompt(i), [], fleet, 0) is not None for i in range(5)]

    assert served("never") == served("now") == [True] * 5  # none of them decodes yet
    assert served("predicted") == [True, True, True, False, False]


def test_who_will_have_decoded_long_enough_by_then_is_taken_off() -> None:
    """First tokens at 16,000, 32,000 and 48,000; at 64,000, when the fourth has its own, the first has to be off."""
    fleet = [Loaded(0), Loaded(1)]
    for decode_ms, fits in ((0.04, True), (0.048, True), (0.049, False)):
        router = make_router(f"mooncake,tbt_ms=0.003,decode_ms={decode_ms}")
        routes = [router.route(prompt(i), [], fleet, 0) for i in range(4)]
        assert (routes[3] is not None) == fits


def test_early_rejection_counts_a_decode_from_its_first_token_to_its_end() -> None:
    router, fleet = make_router("mooncake,reject=now,tbt_ms=0.002"), [Loaded(0), Loaded(1)]
    first, second = prompt(0), prompt(1)
    assert router.route(first, [], fleet, 0)
    assert router.route(second, [], fleet, 0)
    first.first_token_ns = 16_000
    assert router.route(prompt(2), [], fleet, 20_000)
    second.first_token_ns = 32_000
    assert router.route(prompt(3), [], fleet, 40_000) is None
    router.on_end(first, 0, 41_000)
    assert router.route(prompt(4), [], fleet, 42_000)


def test_objectives_are_the_request_s_own_if_it_may_be_dropped_and_else_the_router_s() -> None:
    """A prompt of 16 tokens takes 16,000 ns."""
    fleet = [Loaded(0), Loaded(1)]
    strict = Slo(ttft_ns=15_999, droppable=True)
    for slo, ttft_ms, fits in (
        (None, "0.016", True),
        (None, "0.015999", False),
        (strict, "none", False),
        (replace(strict, ttft_ns=16_000), "0.001", True),
        (replace(strict, droppable=False), "0.001", True),
    ):
        router = make_router(f"mooncake,ttft_ms={ttft_ms}")
        assert (router.route(prompt(0, slo=slo), [], fleet, 0) is not None) == fits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splitwise,prefill=0", "prefill must be at least 1"),
        ("splitwise,max_pending_tokens=0", "max_pending_tokens must be at least 1"),
        ("distserve,waiting=0", "waiting must be above 0"),
        ("mooncake,threshold=0.5", "threshold must be at least 1"),
        ("mooncake,reject=always", "reject must be one of never, now, predicted"),
        ("mooncake,tbt_ms=0", "tbt_ms must be above 0"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(registry.PolicyError, match=message):
        make_router(text)
