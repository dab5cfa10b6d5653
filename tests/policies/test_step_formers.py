"""Orca, SGLang's step and multi-step scheduling: who shares a step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Slo
from policies.stack import StackSpec
from tests.policies.decisions import decisions
from tests.policies.harness import STEP_NS, Drive, Job
from tests.policies.test_library import jobs

LAGS = st.sampled_from([0, 1])


def drive(
    scheduler: str, work: list[Job], *, blocks: int = 400, budget: int = 200, lag: int = 0, seqs: int = 6
) -> Drive:
    limits = Limits(blocks, 4, seqs, budget, 110, prefix_caching=False, lag=lag)
    return Drive(limits, StackSpec(scheduler), work)


def assert_no_decode_is_left_out(made: Drive) -> None:
    """Between its first step in the decode group and its last, a request is in every step that runs."""
    steps = [step for step in made.steps if step.runs]
    seen: dict[int, list[int]] = {}
    for position, step in enumerate(steps):
        for request_id in made.running.get(step.index, []):
            seen.setdefault(request_id, []).append(position)
    for positions in seen.values():
        assert positions == list(range(positions[0], positions[-1] + 1))


@settings(max_examples=40, deadline=None)
@given(jobs(), LAGS, st.sampled_from([40, 400]))
def test_sarathi_with_a_chunk_as_large_as_everything_is_paged_orca(work: list[Job], lag: int, blocks: int) -> None:
    """Where no step can be full; short of blocks, too, as both hold all of a prompt's."""
    orca = drive("orca", work, budget=10_000, lag=lag, blocks=blocks)
    sarathi = drive("sarathi,chunk_size=10000", work, budget=10_000, lag=lag, blocks=blocks)
    assert decisions(orca) == decisions(sarathi)


@settings(max_examples=40, deadline=None)
@given(jobs(), LAGS)
def test_orca_never_cuts_a_prompt_that_the_decodes_leave_room_for(work: list[Job], lag: int) -> None:
    made = drive("orca", work, budget=80, lag=lag)  # the longest prompt has 60 tokens, and at most 5 others decode
    for step in made.steps:
        assert all(chunk.samples and chunk.start == 0 for chunk in step.chunks)


def test_orca_gives_every_decode_its_token_beside_a_whole_prompt() -> None:
    made = drive("orca", [Job(4, 10), Job(50, 3, arrives=3)])
    mixed = [(step.num_decodes, [c.num_tokens for c in step.chunks]) for step in made.steps if step.chunks]
    assert mixed == [(0, [4]), (1, [50])]


def test_under_orca_a_prompt_beyond_the_budget_is_served_with_blocks_for_all_of_it_from_the_first() -> None:
    made = drive("orca", [Job(4, 30), Job(60, 3, arrives=2)], budget=21, lag=0)
    cut = [[(c.request.id, c.num_tokens) for c in step.chunks] for step in made.steps if step.chunks]
    assert cut == [[(0, 4)], [(1, 20)], [(1, 20)], [(1, 20)]]
    (admitted,) = [step for step in made.steps if any(r.id == 1 for r in step.admitted)]
    assert any(r.id == 1 for r in admitted.grown)
    later = [step for step in made.steps if step.index > admitted.index and any(c.request.id == 1 for c in step.chunks)]
    assert not any(r.id == 1 for step in later for r in step.grown)


@settings(max_examples=40, deadline=None)
@given(jobs(), LAGS, st.sampled_from([0, 16]))
def test_sglang_prefills_or_decodes_and_cuts_at_most_one_prompt(work: list[Job], lag: int, chunk: int) -> None:
    made = drive(f"sglang,chunked_prefill_size={chunk}", work, budget=32, blocks=60, lag=lag)
    for step in made.steps:
        assert not (step.num_decodes and step.chunks)
        assert sum(not chunk.samples for chunk in step.chunks) <= 1
        assert sum(c.num_tokens for c in step.chunks) <= (chunk or 32)


@settings(max_examples=40, deadline=None)
@given(jobs(), LAGS)
def test_sglangs_mixed_chunks_leave_no_decode_out(work: list[Job], lag: int) -> None:
    made = drive("sglang,chunked_prefill_size=8,mixed_chunk=true", work, budget=32, lag=lag)
    assert all(sum(c.num_tokens for c in step.chunks) <= 8 for step in made.steps)
    assert_no_decode_is_left_out(made)


@settings(max_examples=40, deadline=None)
@given(jobs(), LAGS)
def test_where_nothing_is_short_sglangs_mixed_chunks_are_vllms_mixed_steps(work: list[Job], lag: int) -> None:
    sglang = drive("sglang,mixed_chunk=true", work, budget=10_000, lag=lag)
    assert decisions(sglang) == decisions(drive("mixed", work, budget=10_000, lag=lag))


def test_a_prefill_step_of_sglang_makes_decodes_wait_and_a_mixed_one_does_not() -> None:
    work = [Job(4, 12), Job(40, 2, arrives=3)]
    for knobs, gaps in ((",chunked_prefill_size=10", [4]), (",chunked_prefill_size=10,mixed_chunk=true", [])):
        made = drive(f"sglang{knobs}", work)
        ran = [step.index for step in made.steps if 0 in made.running.get(step.index, []) or step.num_decodes]
        stalls = [b - a - 1 for a, b in pairwise(ran) if b - a > 1]
        assert stalls == gaps


@settings(max_examples=30, deadline=None)
@given(jobs(), LAGS, st.sampled_from(["mixed", "sarathi/chunk_size=12", "prefill_first"]), st.sampled_from([40, 400]))
def test_every_single_step_is_the_inner_scheduler(work: list[Job], lag: int, inner: str, blocks: int) -> None:
    wrapped = drive(f"every,n=1,inner={inner}", work, budget=32, blocks=blocks, lag=lag)
    bare = drive(inner.replace("/", ","), work, budget=32, blocks=blocks, lag=lag)
    assert decisions(wrapped) == decisions(bare)


def test_between_decisions_nobody_is_admitted_and_everybody_decodes() -> None:
    work = [Job(4, 30), *(Job(4, 30, arrives=i) for i in (2, 3, 9))]
    made = drive("every,n=5", work)
    admitted = [(step.index, len(step.admitted)) for step in made.steps if step.admitted]
    assert admitted == [(0, 1), (6, 2), (11, 1)]  # after step 0, in which nobody decodes, at once
    for step in made.steps[1:7]:
        assert step.num_decodes == 1


def test_a_static_batch_that_is_still_forming_forms_under_multi_step_too() -> None:
    """Two prompts, one a step: nobody decodes before both are in, and from then on both do."""
    work = [Job(20, 6), Job(20, 6)]
    bare, wrapped = (drive(name, work, budget=20) for name in ("static", "every,n=4,inner=static"))
    assert [step.num_decodes for step in bare.steps if step.runs][:4] == [0, 0, 2, 2]
    assert decisions(wrapped) == decisions(bare)


@settings(max_examples=30, deadline=None)
@given(jobs(), LAGS, st.integers(2, 9))
def test_multi_step_lets_nobody_decode_while_a_static_batch_forms(work: list[Job], lag: int, n: int) -> None:
    made = drive(f"every,n={n},inner=static/max_batch_size=3", work, budget=24, lag=lag)
    for step in made.steps:
        assert not (step.chunks and step.num_decodes)


@pytest.mark.parametrize("n", [2, 4, 7])
@pytest.mark.parametrize("lag", [0, 1])
def test_who_may_be_twice_as_slow_decodes_half_as_often_under_multi_step_too(lag: int, n: int) -> None:
    work = [Job(4, 30 * n, slo=Slo(tpot_ns=10**6)), Job(4, 30 * n, slo=Slo(tpot_ns=2 * 10**6))]
    limits = Limits(400, 4, 6, 200, 4 + 30 * n, prefix_caching=False, lag=lag)
    made = Drive(limits, StackSpec(f"every,n={n},inner=scorpio"), work)
    fast, slow = made.requests
    assert fast.finish_ns is not None
    last = fast.finish_ns // STEP_NS
    counts = [sum(i in d.tokens for d in decisions(made)[:last]) for i in (0, 1)]
    assert counts[0] == pytest.approx(last, abs=2)
    assert counts[1] == pytest.approx(last / 2, abs=n + 1)
    assert slow.finish_ns is not None


@settings(max_examples=30, deadline=None)
@given(jobs(), LAGS, st.integers(2, 9))
def test_multi_step_never_leaves_a_decode_without_its_token_where_blocks_are_ample(
    work: list[Job], lag: int, n: int
) -> None:
    made = drive(f"every,n={n}", work, lag=lag)
    assert_no_decode_is_left_out(made)


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        ("every,n=0", "n must be at least 1"),
        ("every,inner=mixd", "did you mean 'mixed'"),
        ("every,inner=mixed/long=3", "no knob 'long'"),
        ("sglang,chunked_prefill_size=-1", "must be 0 or more"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(scheduler: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make("scheduler", scheduler, queue=make("queue", "fcfs"))
