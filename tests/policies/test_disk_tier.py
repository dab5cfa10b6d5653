"""Cached prefixes on disk: what is written, what is read back, who waits for it, and that no block is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import CostModel
from policies.plan import DiskCopy, Plan
from policies.prefix import block_keys
from policies.records import REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.disk import Disk
from simulator.simulation import Simulation
from tests.policies.byhand import Desk
from tests.policies.harness import LinearCost
from tests.policies.test_host_tier import FIRST, OTHER, run_whole
from tests.runtime.engines import Rows

LIMITS = Limits(5, 4, 4, 32, 40, num_host_blocks=8, num_disk_blocks=20, disk_read_ns=10, disk_write_ns=10)
PROMPTS = (FIRST, OTHER, tuple(block_keys([3] * 16, 4)), tuple(block_keys([4] * 16, 4)))


def disk(step: Any) -> list[tuple[bool, bytes]]:
    return [(copy.out, copy.key) for copy in step.disk]


def tell(desk: Desk, copies: Sequence[DiskCopy], error: str = "") -> None:
    for copy in copies:
        desk.plane.disk_done(copy.number, error, desk.now)


def written(offload: str = "write_through,fetch=always", cost: CostModel | None = None) -> Desk:
    """A desk whose first prompt is on disk alone: four prompts of four blocks have gone through eight of the host."""
    desk = Desk(LIMITS, offload=offload, cost=cost)
    for keys in PROMPTS:
        for prompt, named in ((16, keys), (2, ()), (2, ())):
            _, step = run_whole(desk, prompt, named)
            tell(desk, step.disk)
    return desk


def ask(desk: Desk, request: Request) -> Any:
    """The step in which a draft finds that it has to wait for the disk."""
    draft = desk.plane.view.draft()
    assert not draft.admit(request)
    assert draft.plan.blocked == [(request, "on disk")]
    return desk.run(draft.finish())


def test_write_through_writes_what_the_host_has_got_and_a_hit_on_disk_is_read_before_it_is_fetched() -> None:
    desk = written()
    again = desk.submit(16, 3, FIRST)
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, hit.host, hit.num_on_disk) == (0, (), 3)
    step = ask(desk, again)
    assert disk(step) == [(False, key) for key in FIRST[:3]]
    assert desk.plane.awaits_disk
    assert desk.plane.view.probe(again).num_on_disk == 3
    tell(desk, step.disk[:2])
    assert desk.plane.view.probe(again).num_on_disk == 1
    tell(desk, step.disk[2:])
    assert not desk.plane.awaits_disk
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, len(hit.host), hit.num_on_disk) == (12, 3, 0)
    step = desk.run(Plan(chunks=[(again, 4)]), again)
    assert [chunk.start for chunk in step.chunks] == [12]
    row = dict(zip(REQUESTS, desk.log.requests[-1], strict=True))
    assert (row["cached_tokens"], row["fetched_tokens"], row["disk_tokens"]) == (12, 12, 12)
    rows = [dict(zip(STEPS, row, strict=True)) for row in desk.log.steps]
    assert sum(row["disk_in"] for row in rows) == 12
    assert sum(row["disk_out"] for row in rows) == 4 * rows[-1]["disk_blocks"] == 4 * 16


def test_two_that_hit_the_same_blocks_on_disk_wait_for_one_read() -> None:
    desk = written()
    one, two = desk.submit(16, 3, FIRST), desk.submit(15, 3, FIRST[:3])
    step = ask(desk, one)
    assert len(step.disk) == 3
    assert disk(ask(desk, two)) == []
    tell(desk, step.disk)
    assert [len(desk.plane.view.probe(r).host) for r in (one, two)] == [3, 3]


@pytest.mark.parametrize("error", ["damaged", "missing"])
def test_a_block_that_does_not_come_back_as_it_was_is_forgotten_counted_and_computed(error: str) -> None:
    desk = written()
    again = desk.submit(16, 3, FIRST)
    step = ask(desk, again)
    tell(desk, step.disk[:1])
    tell(desk, step.disk[1:2], error)
    tell(desk, step.disk[2:])
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, hit.num_on_disk) == (4, 0)  # the third is there, but what it stands on is not
    assert desk.run(Plan(chunks=[(again, 12)]), again).refused == []
    assert [dict(zip(STEPS, row, strict=True))["disk_dropped"] for row in desk.log.steps][-1] == 1
    assert [row[5] for row in desk.log.decisions if row[3] == "disk" and row[5]] == [error]


def test_who_goes_away_while_its_blocks_are_read_leaves_them_to_others() -> None:
    desk = written()
    leaves = desk.submit(16, 3, FIRST)
    step = ask(desk, leaves)
    assert desk.plane.cancel(leaves.id, desk.now)
    tell(desk, step.disk)
    assert len(desk.plane.view.probe(desk.submit(16, 3, FIRST)).host) == 3


def test_a_flush_forgets_what_is_on_disk_and_on_its_way_from_there() -> None:
    desk = written()
    again = desk.submit(16, 3, FIRST)
    step = ask(desk, again)
    assert desk.plane.flush(desk.now) > 0
    tell(desk, step.disk)
    hit = desk.plane.view.probe(again)
    assert (hit.num_tokens, hit.num_on_disk) == (0, 0)
    assert desk.plane.view.num_free_host_blocks == 8


def test_a_full_disk_keeps_nothing_more_and_nobody_notices() -> None:
    desk = Desk(LIMITS, offload="write_through,fetch=always")
    for keys in PROMPTS:
        for prompt, named in ((16, keys), (2, ())):
            request, step = run_whole(desk, prompt, named)
            tell(desk, step.disk, "disk full")
            assert request.num_output_tokens == 1
    run_whole(desk, 2, ())
    assert desk.plane.view.probe(desk.submit(16, 3, FIRST)).num_on_disk == 0
    dropped = [dict(zip(STEPS, row, strict=True))["disk_dropped"] for row in desk.log.steps]
    assert sum(dropped) == sum(row[3] == "disk" for row in desk.log.decisions) > 8


def test_write_back_writes_what_the_host_will_evict_before_it_has_to() -> None:
    desk = Desk(replace(LIMITS, num_host_blocks=4), offload="write_back,fetch=always")
    run_whole(desk, 16, FIRST)
    _, step = run_whole(desk, 17, OTHER)  # which takes all blocks: four go to the host, which is full then
    assert disk(step) == []
    step = desk.run(Plan(chunks=[(desk.submit(2, 1), 2)]))
    assert disk(step) == [(True, FIRST[3]), (True, FIRST[2])]  # half of the host is to be free or on disk
    assert desk.plane.view.num_free_host_blocks == 2
    tell(desk, step.disk)
    assert desk.plane.view.num_free_host_blocks == 4


@pytest.mark.parametrize("read_ns", [1, 300])
def test_blocks_are_read_where_that_and_the_copy_are_cheaper_than_computing_them(read_ns: int) -> None:
    class Cost(LinearCost):
        def step_ns(self, shape: StepShape) -> int:
            return super().step_ns(shape._replace(swapped_in=0)) + 1 * shape.swapped_in

    cost = Cost()
    desk = written("write_through", cost)
    object.__setattr__(desk.plane._state.limits, "disk_read_ns", read_ns)  # 12 tokens are computed in about 250 ns
    again = desk.submit(16, 3, FIRST)
    assert desk.plane.view.probe(again).num_on_disk == (3 if read_ns == 1 else 0)


def test_reads_and_writes_queue_for_one_disk() -> None:
    there = Disk(Limits(5, disk_read_ns=10, disk_write_ns=30))
    ops = [DiskCopy(i, out, 0, 0, b"") for i, out in enumerate([False, True, False])]
    assert list(there.ends(ops[:2], 100)) == [(0, 110), (1, 140)]
    assert list(there.ends(ops[2:], 105)) == [(2, 150)]
    assert list(there.ends(ops[:1], 1000)) == [(0, 1010)]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_blocks_are_conserved_in_every_tier_and_everyone_ends(data: st.DataObject) -> None:
    """The simulated panel with its checks on after every call."""
    offload = data.draw(st.sampled_from(["write_back", "write_through", "after_hits", "write_back,ttl_s=0.00003"]))
    ahead = data.draw(st.booleans())
    limits = Limits(
        26, 4, 4, 32, 110, lag=data.draw(st.integers(0, 1)), num_host_blocks=data.draw(st.integers(1, 30)),
        num_disk_blocks=data.draw(st.sampled_from([1, 20, 90])), disk_read_ns=data.draw(st.integers(0, 3000)),
        disk_write_ns=500,
    )  # fmt: skip
    stack = StackSpec(preemption="last_admitted,mode=swap", offload=f"{offload},fetch=always,ahead={ahead}")
    rows, gap = Rows(), data.draw(st.integers(500, 6000))
    arrivals = [
        Arrival(Request(i, gap * i, 8 + 12 * (i // 5), 4), 4, block_keys([i % 5] * 60, 4)[: 2 + 3 * (i // 5)])
        for i in range(20)
    ]
    Simulation(limits, [stack.build(block_size=4)], ConstantCost(2000), recorder=rows, check=True).run(arrivals)
    assert [rows.requests[i]["status"] for i in range(20)] == ["length"] * 20
    asked = sum(step["disk_out"] + step["disk_in"] for step in rows.steps) // 4
    assert sum(row["kind"] == "disk" for row in rows.decisions) == asked
