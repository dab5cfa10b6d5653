"""Every scheduler against a slow one written from its paper, and against what must hold of it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.prefix import block_keys
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions, outcomes, steps
from tests.policies.harness import Drive, Job

REFERENCES = "tests.policies.reference_schedulers:"
SCHEDULERS = ["mixed", "mixed,long_prefill_threshold=5", "sarathi,chunk_size=12", "prefill_first", "static"]


@st.composite
def jobs(draw: st.DrawFn, most: int = 12) -> list[Job]:
    """Requests of up to 60 + 40 tokens, some with a common prefix, some cancelled."""
    made = []
    for i in range(draw(st.integers(1, most))):
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 40))
        shared = draw(st.sampled_from([0, 0, 8, 30]))
        tokens = ([7] * min(shared, prompt) + [100 + i] * 60)[:prompt] + [1000 + i] * output
        cancel = draw(st.sampled_from([None, None, None, 5, 20]))
        arrives, cap = draw(st.integers(0, 30)), output + draw(st.integers(0, 9))
        made.append(Job(prompt, output, arrives, cap, tuple(block_keys(tokens, 4)), cancel, draw(st.integers(0, 2))))
    return made


LIMITS = st.builds(
    lambda blocks, seqs, budget, caching, lag: Limits(blocks, 4, seqs, budget, 110, prefix_caching=caching, lag=lag),
    st.sampled_from([28, 32, 40, 60, 400]),
    st.sampled_from([2, 6, 12]),
    st.sampled_from([3, 16, 40, 70]),
    st.booleans(),
    st.sampled_from([0, 1]),
)
GATES = st.sampled_from([
    ("full_prompt", "full_prompt", 0.0),
    ("watermark,watermark=0", "watermark", 0.0),
    ("watermark,watermark=0.1", "watermark", 0.1),
])  # fmt: skip
ORDERS = st.sampled_from(["fcfs", "priority", "sjf"])


def compare(limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str, fast: str, slow: str) -> Drive:
    """The fast scheduler decides as the slow one does in every step."""
    admission, rule, watermark = gate
    reference = f"{REFERENCES}{slow},order={order},gate={rule},watermark={watermark}"
    return assert_same_run(limits, work, StackSpec(fast, order, admission), StackSpec(reference, order, admission))


@settings(max_examples=80, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS, st.sampled_from([0, 1, 5, 16]))
def test_mixed_decides_like_vllm_v1_written_down_plainly(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str, threshold: int
) -> None:
    fast = f"mixed,long_prefill_threshold={threshold}"
    compare(limits, work, gate, order, fast, f"ReferenceMixed,threshold={threshold}")


@settings(max_examples=80, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS, st.sampled_from([1, 4, 12, 64]))
def test_sarathi_decides_like_its_algorithm_written_down_plainly(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str, chunk_size: int
) -> None:
    compare(limits, work, gate, order, f"sarathi,chunk_size={chunk_size}", f"ReferenceSarathi,chunk_size={chunk_size}")


@settings(max_examples=80, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS)
def test_prefill_first_decides_like_vllm_v0_written_down_plainly(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str
) -> None:
    compare(limits, work, gate, order, "prefill_first", "ReferencePrefillFirst")


@settings(max_examples=80, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS, st.sampled_from([1, 3, 8]), st.sampled_from([0, 0.004]))
def test_static_decides_like_faster_transformer_written_down_plainly(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str, size: int, timeout_ms: float
) -> None:
    fast = f"static,max_batch_size={size},form_timeout_ms={timeout_ms}"
    compare(limits, work, gate, order, fast, f"ReferenceStatic,batch_size={size},timeout_ms={timeout_ms}")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        ("mixed", "ReferenceMixed"),
        ("mixed,long_prefill_threshold=5", "ReferenceMixed,threshold=5"),
        ("sarathi,chunk_size=12", "ReferenceSarathi,chunk_size=12"),
        ("prefill_first", "ReferencePrefillFirst"),
    ],
)
def test_the_comparison_reaches_steps_that_preempt(fast: str, slow: str, lag: int) -> None:
    work = [Job(20, 40, arrives=i) for i in range(8)]
    limits = Limits(30, 4, 6, 32, 110, prefix_caching=False, lag=lag)
    drive = compare(limits, work, ("watermark,watermark=0", "watermark", 0.0), "fcfs", fast, slow)
    assert sum(request.num_preemptions for request in drive.requests) >= 3


# What must hold of all of them


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), ORDERS, st.sampled_from(SCHEDULERS))
def test_every_request_is_somewhere_in_every_step(limits: Limits, work: list[Job], queue: str, scheduler: str) -> None:
    """Oracle A1: submitted = running + waiting + ended, after every plan; times never run back."""
    drive = Drive(limits, StackSpec(scheduler, queue), work)
    rows = [dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests]
    assert sorted(row["request_id"] for row in rows) == list(range(len(work)))
    served = [row for row in rows if row["status"] != "refused"]
    cancelled = [row for row in served if row["status"] == "cancelled"]
    finished = [row for row in served if row["status"] != "cancelled"]
    for step in steps(drive):
        submitted = sum(row["before_step"] <= step["step"] for row in served)
        ended = sum(row["finish_ns"] <= step["plan_ns"] for row in finished)
        # By plans, not by time: with lag two plans may come at one time, and a cancellation between them.
        ended += sum(row["end_before_step"] <= step["step"] for row in cancelled)
        assert step["num_running"] + step["num_waiting"] == submitted - ended
        assert 0 <= step["free_blocks"] + step["idle_blocks"] <= limits.num_blocks
        assert step["plan_ns"] <= step["launch_ns"] <= step["end_ns"]
    plans = [step["plan_ns"] for step in steps(drive)]
    assert plans == sorted(plans)


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), ORDERS, GATES, st.sampled_from(SCHEDULERS))
def test_a_replica_with_work_never_idles(
    limits: Limits, work: list[Job], queue: str, gate: tuple[str, str, float], scheduler: str
) -> None:
    """Oracle A2, where a step's ends are known before the next plan."""
    drive = Drive(dataclasses.replace(limits, lag=0), StackSpec(scheduler, queue, gate[0]), work)
    for step in steps(drive):
        assert step["num_decodes"] + step["chunk_tokens"] > 0 or step["num_running"] + step["num_waiting"] == 0


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), GATES, st.sampled_from(SCHEDULERS))
def test_nobody_is_admitted_ahead_of_a_more_urgent_one_that_waits(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], scheduler: str
) -> None:
    """Oracle D3: strict order, first come first served within a class."""
    drive = Drive(dataclasses.replace(limits, lag=0), StackSpec(scheduler, "priority", gate[0]), work)
    rows = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests}
    waiting_again: set[int] = set()
    for made, step in zip(decisions(drive), drive.steps, strict=True):
        waiting_again = (waiting_again | set(made.preempted)) - set(made.admitted)
        for i in made.admitted:
            for j, row in rows.items():
                if row["status"] == "refused" or row["before_step"] > step.index:
                    continue
                never_ran = row["first_scheduled_ns"] is None or row["first_scheduled_ns"] > step.plan_ns
                gone = row["finish_ns"] is not None and row["finish_ns"] <= step.plan_ns
                if not gone and (never_ran or j in waiting_again):
                    ours, theirs = drive.requests[i], drive.requests[j]
                    assert (ours.priority, *ours.key) < (theirs.priority, *theirs.key)


@settings(max_examples=40, deadline=None)
@given(LIMITS, jobs(), GATES, st.sampled_from(SCHEDULERS))
def test_shortest_first_among_equals_is_first_come_first_served(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], scheduler: str
) -> None:
    same = [dataclasses.replace(job, output=9, cap=9) for job in work]
    assert_same_run(limits, same, StackSpec(scheduler, "sjf", gate[0]), StackSpec(scheduler, "fcfs", gate[0]))


@settings(max_examples=40, deadline=None)
@given(LIMITS, jobs(), GATES, st.sampled_from(SCHEDULERS))
def test_one_class_of_priority_is_first_come_first_served(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], scheduler: str
) -> None:
    same = [dataclasses.replace(job, priority=3) for job in work]
    assert_same_run(limits, same, StackSpec(scheduler, "priority", gate[0]), StackSpec(scheduler, "fcfs", gate[0]))


# What must hold of each


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS, st.sampled_from([1, 12, 64]))
def test_sarathi_keeps_to_its_chunk_size_and_never_leaves_a_decode_out(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str, chunk_size: int
) -> None:
    """Oracle C1, where a step can hold every decode: a running request that has a token gets one in each step."""
    limits = dataclasses.replace(limits, lag=0, max_num_batched_tokens=max(12, limits.max_num_batched_tokens))
    drive = Drive(limits, StackSpec(f"sarathi,chunk_size={chunk_size}", order, gate[0]), work)
    decoding: set[int] = set()
    for made, step in zip(decisions(drive), drive.steps, strict=True):
        assert sum(made.tokens.values()) <= max(chunk_size, step.num_decodes)
        decoding -= {r.id for r in drive.requests if r.finish_ns is not None and r.finish_ns <= step.plan_ns}
        decoding -= set(made.preempted)
        assert decoding <= made.tokens.keys()
        decoding |= {chunk.request.id for chunk in step.chunks if chunk.samples}


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS)
def test_prefill_first_never_mixes_prefills_and_decodes(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str
) -> None:
    """Oracle C2."""
    for step in Drive(limits, StackSpec("prefill_first", order, gate[0]), work).steps:
        assert not (step.chunks and step.num_decodes)


def test_under_prefill_first_a_burst_of_prompts_stalls_the_decodes_and_under_sarathi_it_does_not() -> None:
    """Oracle C2's other half: a decode waits as many steps as full prefills come back to back."""
    work = [Job(4, 30)] + [Job(16, 4, arrives=5) for _ in range(5)]
    limits = Limits(200, 4, 8, 16, 80, prefix_caching=False)
    gaps = {}
    for scheduler in ("prefill_first", "sarathi,chunk_size=16"):
        drive = Drive(limits, StackSpec(scheduler), work)
        ran = [made.step for made in decisions(drive) if 0 in made.tokens]
        gaps[scheduler] = max(b - a for a, b in pairwise(ran))
    assert gaps == {"prefill_first": 6, "sarathi,chunk_size=16": 1}


@settings(max_examples=100, deadline=None)
@given(LIMITS, jobs(), GATES, ORDERS)
def test_mixed_without_a_threshold_is_sarathi_with_the_whole_budget_where_memory_is_ample(
    limits: Limits, work: list[Job], gate: tuple[str, str, float], order: str
) -> None:
    """Oracle C3. The settings: `long_prefill_threshold=0`, `chunk_size` = `max_num_batched_tokens`, blocks for the
    caps of all requests at once. Then prompts may be longer than the budget, and caching and lag do not matter:
    only the last admitted can be in mid-prefill, so walking in order of admission is decodes first."""
    limits = dataclasses.replace(limits, num_blocks=12 * 28 * 2)
    sarathi = f"sarathi,chunk_size={limits.max_num_batched_tokens}"
    assert_same_run(limits, work, StackSpec("mixed", order, gate[0]), StackSpec(sarathi, order, gate[0]))


def test_with_a_threshold_mixed_is_not_sarathi() -> None:
    """Several partial prefills sit ahead of a later decode, so decodes can be left out."""
    work = [Job(30, 5), Job(30, 5), Job(2, 20)]
    limits = Limits(200, 4, 8, 10, 80, prefix_caching=False)
    mixed = Drive(limits, StackSpec("mixed,long_prefill_threshold=5"), work)
    sarathi = Drive(limits, StackSpec("sarathi,chunk_size=10"), work)
    assert outcomes(mixed) != outcomes(sarathi)


@settings(max_examples=60, deadline=None)
@given(LIMITS, jobs(), ORDERS, st.sampled_from([1, 3, 8]))
def test_static_frees_no_memory_before_its_last_member_ends(
    limits: Limits, work: list[Job], order: str, size: int
) -> None:
    """Oracle C4: once a batch has formed, the free blocks stay as they are until it is over."""
    work = [dataclasses.replace(job, cancel=None) for job in work]
    limits = dataclasses.replace(limits, prefix_caching=False)
    drive = Drive(limits, StackSpec(f"static,max_batch_size={size}", order), work)
    batch: set[int] = set()
    free = limits.num_blocks
    for made, row in zip(decisions(drive), steps(drive), strict=True):
        joined = set(made.admitted)
        alive = {i for i in batch if (drive.requests[i].finish_ns or 0) > row["plan_ns"]}
        if joined and not alive:
            batch = set()
        if alive or joined:
            batch |= joined
            assert len(batch) <= size
            held = sum(-(-(drive.requests[i].num_prompt_tokens + drive.requests[i].max_tokens) // 4) for i in batch)
            assert row["free_blocks"] == limits.num_blocks - held
        free = row["free_blocks"]
    assert free == limits.num_blocks or batch


def test_a_static_batch_takes_as_many_steps_as_its_longest_member_has_tokens() -> None:
    """Oracle C4, the padding: of a batch's slots, mean(output) / max(output) do work."""
    outputs = [3, 9, 5, 7, 1, 4, 4, 2]
    work = [Job(4, output) for output in outputs]
    limits = Limits(400, 4, 8, 64, 80, prefix_caching=False)
    drive = Drive(limits, StackSpec("static,max_batch_size=4"), work)
    ran = [made for made in decisions(drive) if made.tokens]
    assert len(ran) == max(outputs[:4]) + max(outputs[4:])
    first = [made for made in ran if set(made.tokens) <= {0, 1, 2, 3}]
    assert sum(len(made.tokens) for made in first) / (4 * len(first)) == sum(outputs[:4]) / 4 / max(outputs[:4])


def test_a_static_batch_waits_for_more_until_its_timeout() -> None:
    work = [Job(4, 2), Job(4, 2, arrives=1), Job(4, 2, arrives=9)]
    limits = Limits(400, 4, 8, 64, 80, prefix_caching=False)
    drive = Drive(limits, StackSpec("static,max_batch_size=4,form_timeout_ms=0.01"), work)
    assert [made.admitted for made in decisions(drive) if made.admitted] == [[0, 1], [2]]
    assert drive.steps[0].wake_at == 10_000
    full = Drive(limits, StackSpec("static,max_batch_size=1,form_timeout_ms=0.01"), work[:1])
    assert full.steps[0].wake_at is None


def test_a_prompt_beyond_the_budget_is_prefilled_alone_in_steps_of_its_own() -> None:
    drive = Drive(Limits(100, 4, 8, 16, 80, prefix_caching=False), StackSpec("prefill_first"), [Job(40, 3), Job(4, 3)])
    assert [made.chunks for made in decisions(drive)][:4] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 8)], [(1, 0, 4)]]
    assert drive.requests[0].num_preemptions == 0
