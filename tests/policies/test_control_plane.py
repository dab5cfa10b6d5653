"""The control plane under every scheduler: nothing is lost, nobody is favoured, everything ends."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.control_plane import ControlPlane
from policies.plan import Plan, Report
from policies.prefix import block_keys
from policies.records import DECISIONS, REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.harness import Drive, Job, Log

SCHEDULERS = [
    "static,max_batch_size=3",
    "prefill_first",
    "mixed",
    "mixed,long_prefill_threshold=7",
    "sarathi,chunk_size=24",
]
ADMISSIONS = ["watermark,watermark=0.1", "full_prompt", "reserve_max"]
QUEUES = ["fcfs", "priority", "sjf", "sjf,predictor=oracle"]


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    prefixes = [[7] * 40, [9] * 20 + [3] * 30]
    made = []
    for i in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, 60))
        output = draw(st.integers(1, 40))
        prefix = draw(st.sampled_from(prefixes))
        own = draw(st.integers(0, 60))
        tokens = (prefix[: prompt - own if prompt > own else 0] + [100 + i] * 200)[:prompt]
        # The future is known here, so the keys of generated blocks are too: everybody generates differently.
        keys = tuple(block_keys(tokens + [1000 + i] * output, 4))
        cancel = draw(st.one_of(st.none(), st.none(), st.integers(0, 60)))
        made.append(
            Job(prompt, output, draw(st.integers(0, 30)), output + draw(st.integers(0, 9)), keys, cancel, i % 3)
        )
    return made


@settings(max_examples=150, deadline=None)
@given(
    jobs(),
    st.sampled_from(SCHEDULERS),
    st.sampled_from(ADMISSIONS),
    st.sampled_from(QUEUES),
    st.integers(30, 60),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_every_request_ends_with_its_tokens_whatever_the_policy_the_memory_and_the_lag(
    work: list[Job], scheduler: str, admission: str, queue: str, num_blocks: int, lag: int, caching: bool
) -> None:
    limits = Limits(num_blocks, 4, 6, 32, 110, prefix_caching=caching, lag=lag)
    drive = Drive(limits, StackSpec(scheduler, queue, admission), work)
    rows = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests}
    assert sorted(rows) == list(range(len(work)))
    for i, job in enumerate(work):
        row = rows[i]
        if row["status"] in ("stop", "length"):
            assert row["output_tokens"] == job.output
            assert row["arrival_ns"] <= row["first_scheduled_ns"] <= row["first_token_ns"] <= row["finish_ns"]
            runs = row["decode_runs"]
            counted = len(row["token_steps"]) + sum(b - a for a, b in zip(runs[::2], runs[1::2], strict=True))
            assert job.output <= counted <= job.output + lag
        else:
            assert row["status"] == "refused" or (row["status"] == "cancelled" and job.cancel is not None)
    view = drive.plane.view
    assert view.num_free_blocks + sum(r.num_blocks for r in drive.requests) == num_blocks
    for row in drive.log.steps:
        step = dict(zip(STEPS, row, strict=True))
        assert step["num_decodes"] + step["chunk_tokens"] <= limits.max_num_batched_tokens
        assert step["num_running"] <= limits.max_num_seqs
    assert [row[1] for row in drive.log.steps] == sorted(row[1] for row in drive.log.steps)
    assert not [row for row in drive.log.decisions if dict(zip(DECISIONS, row, strict=True))["kind"] == "refused"]


@settings(max_examples=40, deadline=None)
@given(jobs(), st.sampled_from(SCHEDULERS), st.sampled_from([0, 1]))
def test_the_same_run_twice_gives_the_same_records(work: list[Job], scheduler: str, lag: int) -> None:
    limits = Limits(40, 4, 6, 32, 110, lag=lag)
    first, second = (Drive(limits, StackSpec(scheduler), work).log for _ in range(2))
    assert dataclasses.astuple(first) == dataclasses.astuple(second)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", ["prefill_first", "mixed", "sarathi,chunk_size=24"])
def test_short_memory_preempts_and_everybody_still_ends(scheduler: str, lag: int) -> None:
    work = [Job(20, 40) for _ in range(6)]
    drive = Drive(Limits(30, 4, 6, 32, 110, prefix_caching=False, lag=lag), StackSpec(scheduler), work)
    assert sum(request.num_preemptions for request in drive.requests) > 0
    assert all(request.state.value == "length" for request in drive.requests)


@pytest.mark.parametrize("cancelled_before", [0, 1, 5])
def test_a_scheduler_hears_of_a_cancellation_in_whatever_state(cancelled_before: int) -> None:
    heard: list[tuple[int, str]] = []
    limits = Limits(40, 4, 6, 32, 110, prefix_caching=False)
    stack = StackSpec().build()
    scheduler = stack.scheduler
    remove = scheduler.remove

    def listen(request: Request, now: int) -> None:
        heard.append((request.id, request.state.value))
        remove(request, now)

    scheduler.remove = listen  # type: ignore[method-assign]
    plane = ControlPlane(limits, stack, check=True)
    plane.submit(Request(0, 0, 60, 20), 0)
    for now in range(cancelled_before):
        step = plane.plan(now)
        plane.report(Report(step, now, now, 0))
    assert plane.cancel(0, cancelled_before)
    assert heard == [(0, "cancelled")]
    assert plane.num_free_blocks == 40


def test_blocks_of_generated_tokens_can_be_hit_by_the_names_that_they_get() -> None:
    keys = tuple(block_keys([1] * 12, 4))
    desk = Desk(Limits(20, 4, 4, 32, 80))
    request = desk.submit(8, keys=keys[:2])
    desk.run(Plan(chunks=[(request, 8)]))
    for _ in range(3):
        desk.run(Plan(decode_all=True))
    assert desk.plane.match(keys) == 2
    step = desk.plan(Plan(decode_all=True))  # which computes the twelfth token, the last of the third block
    desk.plane.extend_keys(request, keys[2:])
    desk.report(step)
    assert desk.plane.match(keys) == 3


def test_the_first_token_comes_with_the_last_chunk_of_a_prompt_and_no_later_token_moves_its_time() -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=False))
    request = desk.submit(20)
    for tokens, at in ((8, None), (8, None), (4, 30)):
        desk.run(Plan(chunks=[(request, tokens)]))
        assert request.first_token_ns == at
    desk.run(Plan(decode_all=True))
    desk.run(Plan(decodes=[request]))
    assert request.first_token_ns == 30
    assert request.num_output_tokens == 3


def test_what_is_recorded_of_a_request_stays_as_it_was_when_the_request_ended() -> None:
    log = Log()
    plane = ControlPlane(Limits(num_blocks=10), StackSpec().build(), recorder=log)
    request = Request(0, 0, 32, 8)
    plane.submit(request, 0, [b"a", b"b"])
    plane.plan(0)
    plane.cancel(0, 5)
    plane.extend_keys(request, [b"c"])  # the step that fills this block is still in flight
    request._token_steps.append(1)
    (row,) = log.requests
    recorded = dict(zip(REQUESTS, row, strict=True))
    assert recorded["block_keys"] == [b"a", b"b"]
    assert recorded["token_steps"] == [0]
