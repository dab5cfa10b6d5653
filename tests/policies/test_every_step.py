"""What must hold of every single step under every policy: nobody is lost, nothing idles, no token is computed twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from policies.plan import Mode
from policies.prefix import block_keys
from policies.records import ALIVE, DECISIONS, REQUESTS
from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.decisions import steps
from tests.policies.harness import Drive, Job
from tests.policies.library import EVERY, says

TIGHT = Limits(32, 4, 6, 24, 110, prefix_caching=True, num_host_blocks=40)
AMPLE = Limits(400, 4, 4, 1_000, 110, prefix_caching=False)
HOLDS_BACK = ("multi_bin", "rpm")
"""Queues that let a request wait although it could run, by definition, until a time that they name."""
FILLS_LATER = (*HOLDS_BACK, "static", "every")
"""And schedulers that leave free slots free until the batch is over, or until they decide again."""


def run(stack: StackSpec, limits: Limits) -> Drive:
    """Ten requests of several tenants, sessions, programs and classes, of which some begin alike.

    What the control plane checks by itself is checked in `test_library`.
    """
    draw = np.random.default_rng(limits.num_blocks)
    made = []
    for i in range(10):
        prompt, output = int(draw.integers(1, 60)), int(draw.integers(1, 40))
        shared = min(prompt, int(draw.choice([0, 0, 8, 30])))
        keys = block_keys([7] * shared + [100 + i] * (prompt - shared) + [1000 + i] * output, 4)
        made.append(
            Job(
                prompt, output, int(draw.integers(0, 25)), output + int(draw.integers(0, 9)), tuple(keys),
                priority=int(draw.integers(0, 3)), tenant="abc"[i % 3], session=i % 4, program=int(draw.integers(0, 4)),
            )
        )  # fmt: skip
    return Drive(limits, stack, made, check=False)


def names(stack: StackSpec, which: tuple[str, ...]) -> bool:
    return any(name in says(stack) for name in which)


@pytest.mark.parametrize("stack", EVERY, ids=says)
def test_in_every_step_nobody_is_lost_and_something_is_computed_and_no_token_twice(stack: StackSpec) -> None:
    """Oracles A1, A2 and D1: one test, as the runs take longer than looking at them."""
    tight, ample = run(stack, TIGHT), run(stack, AMPLE)
    for drive in (tight, ample):
        assert_nobody_is_lost(drive)
        assert_every_step_computes(drive, names(stack, HOLDS_BACK))
        assert_each_token_is_computed_once(drive)
    if not names(stack, FILLS_LATER):
        assert_slots_are_full(ample)


def assert_nobody_is_lost(drive: Drive) -> None:
    """Oracle A1: who has come is running, waiting, paused, swapped out or ended, and no clock runs back.

    That blocks are conserved, too, is checked after each call in `test_library`."""
    requests = [dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests]
    for step in steps(drive):
        arrived = sum(row["before_step"] <= step["step"] for row in requests)
        ended = sum(row["finish_ns"] <= step["plan_ns"] for row in requests)
        assert sum(step[place] for place in ALIVE) == arrived - ended
        assert step["plan_ns"] <= step["launch_ns"] <= step["end_ns"]
    plans = [step["plan_ns"] for step in steps(drive)]
    assert plans == sorted(plans)
    for row in requests:
        assert row["arrival_ns"] <= row["first_scheduled_ns"] < row["first_token_ns"] <= row["finish_ns"]


def assert_every_step_computes(drive: Drive, may_hold_back: bool) -> None:
    """Oracle A2: while anybody is there. One request alone always fits, so there is always one that can run."""
    for step in steps(drive):
        if step["num_decodes"] + step["chunk_tokens"] == 0 and sum(step[place] for place in ALIVE):
            assert may_hold_back
            assert step["wake_ns"] > step["plan_ns"]


def assert_slots_are_full(drive: Drive) -> None:
    """Oracle A2, of slots: with blocks and tokens in plenty nobody waits while a slot is free."""
    full = 0
    for step in steps(drive):
        alive = sum(step[place] for place in ALIVE)
        assert step["num_running"] == min(alive, drive.limits.max_num_seqs)
        full += alive > drive.limits.max_num_seqs
    assert full > 20


def assert_each_token_is_computed_once(drive: Drive) -> None:
    """Oracle D1: chunks add up to the prompt less the hit. From the hit on, each begins where the one before has ended,
    and with the token that completes the prompt a token is sampled. Whoever is preempted begins anew, its output being
    part of its prompt."""
    hits: Counter[tuple[int, int]] = Counter()
    for row in drive.log.decisions:
        decision = dict(zip(DECISIONS, row, strict=True))
        if decision["kind"] == "admit":
            hits[decision["step"], decision["request_id"]] = decision["tokens"]
    computed: dict[int, int] = {}  # of those that have begun
    sampled: Counter[int] = Counter()
    for step in drive.steps:
        for request, mode in step.preempted:
            if mode is Mode.RECOMPUTE:
                del computed[request.id]
        for request in step.admitted:
            if request.id not in computed:
                computed[request.id] = hits[step.index, request.id]
        group = [drive.requests[i] for i in drive.running.get(step.index, [])]
        singles = [(request.id, computed[request.id], 1, True) for request in (*step.decodes, *step.capped, *group)]
        chunks = [(chunk.request.id, chunk.start, chunk.num_tokens, chunk.samples) for chunk in step.chunks]
        for i, start, tokens, samples in (*singles, *chunks):
            assert computed[i] == start
            computed[i] += tokens
            known = drive.jobs[i].prompt + sampled[i]
            assert computed[i] <= known
            assert samples == (computed[i] == known)
            sampled[i] += samples
    for i, job in enumerate(drive.jobs):
        assert sampled[i] == job.output
        assert computed[i] == job.prompt + job.output - 1


def test_these_runs_preempt_in_every_way_and_hit_prefixes_and_cut_prompts() -> None:
    """Else what is said of them above is said of nothing."""
    seen: Counter[object] = Counter()
    keeping = run(StackSpec("preemptive,mode=keep", "las,quantum_ms=0"), AMPLE)
    for drive in (keeping, run(StackSpec(), TIGHT), run(StackSpec(preemption="longest,mode=swap"), TIGHT)):
        seen.update(mode for step in drive.steps for _, mode in step.preempted)
        seen["hit"] += sum(request.num_cached_tokens > 0 for request in drive.requests)
        seen["cut"] += sum(not chunk.samples for step in drive.steps for chunk in step.chunks)
    assert min(seen[each] for each in (*Mode, "hit", "cut")) >= 3, seen
