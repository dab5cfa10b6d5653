"""Cached prefixes in host memory: what is kept there, what is fetched, and that it is what it was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.costing import prefill_ns
from policies.host_pool import HostPool
from policies.plan import BlockCopy, Mode, Plan
from policies.prefix import block_keys, root_key
from policies.records import REQUESTS, STEPS
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.harness import Job, LinearCost
from tests.policies.kv_model import KvModel
from tests.policies.test_host_memory import Modelled

LIMITS = Limits(5, 4, 4, 32, 40, num_host_blocks=6)
FIRST, OTHER = (tuple(block_keys([token] * 16, 4)) for token in (1, 2))


def copies(step: Any) -> list[tuple[Any, ...]]:
    return [(copy.out, copy.cached, copy.device, copy.host) for copy in step.copies]


def run_whole(desk: Desk, prompt: int, keys: tuple[bytes, ...]) -> tuple[Request, Any]:
    """A request that ends with its first token, and its step."""
    request = desk.submit(prompt, 1, keys)
    hit = desk.plane.view.probe(request).num_tokens
    return request, desk.run(Plan(chunks=[(request, prompt - hit)]), request)


def test_what_is_evicted_is_written_back_and_fetched_for_the_next_who_hits_it() -> None:
    desk = Desk(LIMITS, offload="write_back")
    run_whole(desk, 16, FIRST)
    _, step = run_whole(desk, 17, OTHER)  # which takes all five blocks; those of the first go tail first, in one copy
    assert copies(step) == [(True, True, (3, 2, 1, 0), (0, 1, 2, 3))]
    assert (step.shape.swapped_out, step.shape.swapped_in) == (16, 0)
    assert desk.plane.view.num_free_host_blocks == 6  # a swapped request may have them all

    again = desk.submit(14, 3, FIRST[:3])
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, hit.blocks, [block.id for block in hit.host]) == (12, (), [3, 2, 1])
    step = desk.run(Plan(chunks=[(again, 2)]))
    assert [(chunk.start, chunk.num_tokens, chunk.samples) for chunk in step.chunks] == [(12, 2, True)]
    # the unnamed block of the other one is free; its three others go out, the first of them before it is filled anew
    assert [(copy.out, copy.cached, copy.host) for copy in step.copies] == [
        (True, True, (4, 5)), (False, True, (3, 2, 1)), (True, True, (0,)),
    ]  # fmt: skip
    assert (step.shape.swapped_out, step.shape.swapped_in) == (12, 12)
    assert (again.num_cached_tokens, again.num_fetched_tokens, again.num_blocks) == (12, 12, 4)
    rows = [dict(zip(STEPS, row, strict=True)) for row in desk.log.steps]
    columns = ("swapped_out", "offloaded", "swapped_in", "fetched", "free_host_blocks", "idle_host_blocks")
    assert [[row[name] for name in columns] for row in rows] == [
        [0, 0, 0, 0, 6, 0], [16, 16, 0, 0, 2, 4], [12, 12, 12, 12, 0, 6],
    ]  # fmt: skip
    desk.run(Plan(decode_all=True), again)
    fetched = [dict(zip(REQUESTS, row, strict=True))["fetched_tokens"] for row in desk.log.requests]
    assert fetched == [0, 0, 12]


def test_a_hit_goes_on_in_host_memory_where_the_device_has_no_more_of_it() -> None:
    desk = Desk(LIMITS, offload="write_back")
    run_whole(desk, 16, FIRST)
    run_whole(desk, 9, OTHER[:2])
    again = desk.submit(16, 3, FIRST)
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, [b.depth for b in hit.blocks], len(hit.host)) == (12, [0, 1], 1)
    step = desk.run(Plan(chunks=[(again, 4)]))
    assert step.shape.swapped_in == 4
    assert again._blocks[:2] == [0, 1]


def test_two_that_hit_the_same_host_blocks_in_one_step_fetch_them_each_and_both_compute_on_them() -> None:
    desk = Desk(Limits(8, 4, 4, 32, 40, num_host_blocks=4), offload="write_back")
    run_whole(desk, 16, FIRST)
    run_whole(desk, 31, tuple(block_keys([3] * 28, 4)))
    one, two = desk.submit(9, 3, FIRST[:2]), desk.submit(10, 3, FIRST[:2])
    assert desk.plane.view.draft().admit(one)
    step = desk.run(Plan(chunks=[(one, 1), (two, 2)]))
    assert step.refused == []
    fetches = [copy for copy in step.copies if not copy.out]
    assert [copy.host for copy in fetches] == [fetches[0].host] * 2
    assert not set(fetches[0].device) & set(fetches[1].device)
    assert [one.num_fetched_tokens, two.num_fetched_tokens] == [8, 8]
    desk.run(Plan(decode_all=True), one, two)


def test_what_is_being_fetched_is_not_given_up_for_what_is_evicted_to_make_room_for_it() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 40, num_host_blocks=3), offload="write_back")
    run_whole(desk, 13, FIRST[:3])
    run_whole(desk, 17, OTHER)
    again = desk.submit(14, 3, FIRST[:3])
    assert [block.id for block in desk.plane.view.probe(again).host] == [2, 1, 0]
    step = desk.run(Plan(chunks=[(again, 2)]))
    fetch, kept = step.copies  # two of the other's blocks are lost, as the host is full of what is fetched
    assert (fetch.out, fetch.host, kept.out, kept.host) == (False, (2, 1, 0), True, (0,))


def test_write_through_copies_a_block_with_the_step_after_the_one_that_fills_it_and_evicts_for_nothing() -> None:
    desk = Desk(LIMITS, offload="write_through")
    first = desk.submit(9, 3, FIRST[:2])
    assert desk.run(Plan(chunks=[(first, 9)])).copies == []
    assert copies(desk.run(Plan(decode_all=True))) == [(True, True, (0, 1), (0, 1))]
    assert desk.run(Plan(decode_all=True), first).copies == []
    _, step = run_whole(desk, 17, OTHER)
    assert step.copies == []
    assert desk.plane.view.probe(desk.submit(9, 3, FIRST[:2])).num_tokens == 8


def test_after_so_many_hits_a_block_is_copied_and_one_that_was_hit_less_is_lost() -> None:
    desk = Desk(Limits(8, 4, 4, 32, 40, num_host_blocks=6), offload="after_hits,hits=2")
    for _ in range(2):
        run_whole(desk, 9, FIRST[:2])
    request = desk.submit(9, 3, FIRST[:2])
    assert desk.run(Plan(chunks=[(request, 1)])).copies == []
    assert copies(desk.run(Plan(decode_all=True), request)) == [(True, True, (0, 1), (0, 1))]
    run_whole(desk, 9, OTHER[:2])
    run_whole(desk, 31, tuple(block_keys([3] * 28, 4)))
    assert desk.plane.view.probe(desk.submit(9, 3, FIRST[:2])).num_tokens == 8
    assert desk.plane.view.probe(desk.submit(9, 3, OTHER[:2])).num_tokens == 0


def test_swapped_requests_have_precedence_and_full_host_memory_keeps_nothing() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 40, num_host_blocks=2), offload="write_back")
    run_whole(desk, 16, FIRST)
    swapped, other = desk.submit(6), desk.submit(3)
    step = desk.run(Plan(chunks=[(swapped, 6), (other, 3)]))
    assert copies(step) == [(True, True, (3, 2), (0, 1))]
    desk.run(Plan(preempt=[(swapped, Mode.SWAP)], decode_all=True))
    assert (swapped.num_host_blocks, desk.plane.view.num_free_host_blocks) == (2, 0)
    filler = desk.submit(13, 2)
    step = desk.run(Plan(chunks=[(filler, 13)], decode_all=True))
    assert step.copies == []  # the first one's other blocks are evicted, and the host has no room for them
    desk.run(Plan(decode_all=True), filler, other)
    step = desk.run(Plan(resume=[swapped], decode_all=True))
    assert step.resumed == [swapped]
    assert desk.plane.view.num_free_host_blocks == 2


def test_copies_that_nobody_has_used_for_their_time_to_live_are_forgotten() -> None:
    desk = Desk(LIMITS, offload="write_back,ttl_s=0.0000001")  # 100 ns
    run_whole(desk, 16, FIRST)
    run_whole(desk, 17, OTHER)
    waiting = desk.submit(16, 3, FIRST)
    desk.now += 90
    desk.plan(Plan())
    assert desk.plane.view.probe(waiting).num_tokens == 12
    desk.plane._empty_plans = 0  # idling is allowed here
    desk.now += 1
    desk.plan(Plan())
    assert desk.plane.view.probe(waiting).num_tokens == 0


def test_salted_keys_never_meet_on_the_host_and_a_flush_forgets_it_too() -> None:
    desk = Desk(LIMITS, offload="write_back")
    salted = tuple(block_keys([1] * 16, 4, root_key(b"tenant a")))
    run_whole(desk, 16, salted)
    run_whole(desk, 17, OTHER)
    assert desk.plane.view.probe(desk.submit(16, 3, FIRST)).num_tokens == 0
    mine = desk.submit(16, 3, salted)
    assert desk.plane.view.probe(mine).num_tokens == 12
    assert desk.plane.flush(desk.now) == 4 + 4
    assert desk.plane.view.probe(mine).num_tokens == 0


def test_what_a_request_hits_that_waits_for_a_slot_is_fetched_while_it_waits() -> None:
    desk = Desk(Limits(8, 4, 1, 32, 40, num_host_blocks=8), offload="write_back,ahead=true")
    run_whole(desk, 16, FIRST)
    run_whole(desk, 31, tuple(block_keys([3] * 28, 4)))
    runs = desk.submit(5, 9)
    desk.run(Plan(chunks=[(runs, 5)]))
    waits = desk.submit(16, 3, FIRST)
    assert (desk.plane.view.probe(waits).blocks, len(desk.plane.view.probe(waits).host)) == ((), 3)
    draft = desk.plane.view.draft()
    assert draft.run_everyone()
    assert not draft.admit(waits)
    step = desk.run(draft.finish())
    assert [(copy.out, copy.request, len(copy.device)) for copy in step.copies if not copy.out] == [(False, waits, 3)]
    assert (waits.num_blocks, len(desk.plane.view.probe(waits).blocks)) == (0, 3)
    draft = desk.plane.view.draft()
    assert draft.run_everyone()
    assert not draft.admit(waits)
    assert desk.run(draft.finish(), runs).copies == []
    step = desk.run(Plan(chunks=[(waits, 4)]))
    assert (waits.num_cached_tokens, waits.num_fetched_tokens, step.copies) == (12, 0, [])


@pytest.mark.parametrize("when", ["waiting", "fetched ahead", "fetching", "fetched", "written through", "swapped out"])
def test_who_goes_away_leaves_both_tiers_whole_and_their_content_right(when: str) -> None:
    """With a step in flight; what is computed and copied is carried out token by token."""
    offload = "write_through" if when == "written through" else "write_back"
    desk, model = Desk(Limits(12, 4, 4, 32, 40, lag=1, num_host_blocks=9), offload=offload), KvModel(4)

    def run(plan: Plan, *finished: Request) -> None:
        step = desk.plan(plan)
        model.run(step, list(desk.plane.decode_group()) if step.decode_all else [])
        assert step.refused == []
        flight.append(step)
        if len(flight) > 1:
            desk.report(flight.pop(0), *finished)

    flight: list[Any] = []
    first = desk.submit(16, 1, FIRST)
    run(Plan(chunks=[(first, 16)]))
    other = desk.submit(13, 9)
    run(Plan(chunks=[(other, 13)]), first)
    filler = desk.submit(28, 1)
    run(Plan(chunks=[(filler, 28)], decode_all=True))  # which evicts three blocks of the first one
    run(Plan(decode_all=True), filler)
    leaves = desk.submit(15, 5, FIRST[:3])
    if when == "fetched ahead":
        run(Plan(decode_all=True, fetch=[(leaves, "host")]))
    elif when in ("fetching", "fetched"):
        run(Plan(chunks=[(leaves, 15 - desk.plane.view.probe(leaves).num_tokens)], decode_all=True))
        assert leaves.num_fetched_tokens > 0
        if when == "fetched":
            run(Plan(decode_all=True))
    elif when == "written through":
        run(Plan(decode_all=True))
    elif when == "swapped out":
        run(Plan(preempt=[(other, Mode.SWAP)], chunks=[(leaves, 3)]))
    assert desk.plane.cancel((other if when == "swapped out" else leaves).id, desk.now)
    again = desk.submit(15, 5, FIRST[:3])
    hit = desk.plane.view.probe(again)
    assert hit.num_tokens == 12
    run(Plan(chunks=[(again, 3)], decode_all=desk.plane.view.num_decoding > 0))
    run(Plan(decode_all=True))
    for request in (other, leaves, again):
        desk.plane.cancel(request.id, desk.now)
    assert (desk.plane.num_free_blocks, desk.plane.view.num_free_host_blocks) == (12, 9)


@pytest.mark.parametrize("per_copied", [1, 40])
def test_host_blocks_are_fetched_where_that_is_cheaper_than_computing_them(per_copied: int) -> None:
    class Cost(LinearCost):
        def step_ns(self, shape: StepShape) -> int:
            return super().step_ns(shape._replace(swapped_in=0)) + per_copied * shape.swapped_in

    cost = Cost()
    saved = prefill_ns(cost, 13) - prefill_ns(cost, 1, 12)
    assert saved == 12 * 20 + (13 * 14 // 2) // 8 - (12 + 1) // 8
    cheaper = 12 * per_copied < saved
    assert cheaper == (per_copied == 1)
    for offload, fetches in (("write_back", cheaper), ("write_back,fetch=always", True)):
        desk = Desk(LIMITS, offload=offload, cost=cost)
        run_whole(desk, 16, FIRST)
        run_whole(desk, 17, OTHER)
        assert desk.plane.view.probe(desk.submit(16, 3, FIRST)).num_tokens == 12 * fetches


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ("write_back,ttl_s=0", "ttl_s must be above 0"),
        ("write_back,fetch=never", "fetch must be cheaper or always"),
        ("after_hits,hits=0", "hits must be at least 1"),
    ],
)
def test_knobs_out_of_range_are_refused(offload: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make("offload", offload)


@pytest.mark.parametrize("offload", ["write_back", "write_through", "after_hits", "write_back,ttl_s=0.00005"])
@pytest.mark.parametrize("lag", [0, 1])
def test_with_memory_too_small_for_all_conversations_everyone_ends_on_its_own_context(offload: str, lag: int) -> None:
    """Five conversations of four turns each, and a replica that holds two; every fetched token is checked."""
    jobs = [
        Job(8 + 12 * turn, 4, 25 * turn + 3 * talk, keys=tuple(block_keys([talk] * 60, 4, root_key(bytes([talk % 2])))))
        for turn in range(4)
        for talk in range(5)
    ]
    jobs.sort(key=lambda job: job.arrives)
    stack = StackSpec(preemption="last_admitted,mode=swap", offload=offload)
    drive = Modelled(Limits(26, 4, 4, 32, 110, lag=lag, num_host_blocks=60), stack, jobs)
    assert [drive.output_tokens(i) for i in range(20)] == [4] * 20
    assert sum(request.num_fetched_tokens for request in drive.requests) > 0
    plain = Modelled(Limits(26, 4, 4, 32, 110, lag=lag, num_host_blocks=60), StackSpec(), jobs)
    assert sum(r.num_cached_tokens for r in drive.requests) > sum(r.num_cached_tokens for r in plain.requests)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_pool_is_an_lru_of_what_swapped_requests_leave(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    pool, cached, held = HostPool(size), list[bytes](), list[list[int]]()
    for now in range(25):
        move = data.draw(st.sampled_from(["keep", "keep", "touch", "allocate", "release"]))
        if move == "keep":
            key = bytes([data.draw(st.integers(0, 9))])
            if key not in cached:
                room = size - sum(map(len, held))
                got = pool.keep(key, now)
                assert (got is not None) == (room > 0)
                if room:
                    cached = [*cached[len(cached) - room + 1 if len(cached) >= room else 0 :], key]
        elif move == "touch" and cached:
            key = data.draw(st.sampled_from(cached))
            pool.touch([key], now)
            cached = [*(other for other in cached if other != key), key]
        elif move == "allocate" and pool.num_free:
            count = data.draw(st.integers(1, pool.num_free))
            held.append(pool.allocate(count))
            cached = cached[max(0, len(cached) + sum(map(len, held)) - size) :]
        elif move == "release" and held:
            pool.release(held.pop())
        pool.check(held)
        assert [pool.lookup([key], 0) != [] for key in cached] == [True] * len(cached)
        assert pool.num_cached == len(cached)
        assert pool.num_free == size - sum(map(len, held))


def test_neighbouring_copies_out_are_made_as_one_unless_a_host_block_is_given_out_anew() -> None:
    from policies.host_tier import merged

    def out(device: int, host: int) -> BlockCopy:
        return BlockCopy(None, True, (device,), (host,), cached=True)

    fetch = BlockCopy(Request(0, 0, 1, 1), False, (7, 8), (0, 1), cached=True)
    given = [out(1, 0), out(2, 1), fetch, out(3, 0), out(4, 0)]
    assert [(copy.out, copy.device, copy.host) for copy in merged(given)] == [
        (True, (1, 2), (0, 1)), (False, (7, 8), (0, 1)), (True, (3,), (0,)), (True, (4,), (0,)),
    ]  # fmt: skip
