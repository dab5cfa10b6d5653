"""What must hold of every policy: nothing is lost, all ends, and decisions follow from requests and time alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.prefix import block_keys
from policies.records import DECISIONS, REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Slo
from policies.stack import StackSpec
from tests.policies.decisions import decisions, outcomes
from tests.policies.harness import STEP_NS, Drive, Job
from tests.policies.library import DRAWS, EVERY, says
from tests.policies.test_plan_purity import StampedDrive, StampedJob, renamed

SLOS = st.one_of(
    st.none(),
    st.builds(
        Slo,
        st.one_of(st.none(), st.integers(1, 60).map(lambda n: n * STEP_NS)),
        st.one_of(st.none(), st.integers(1, 8).map(lambda n: n * STEP_NS)),
        droppable=st.booleans(),
    ),
)


@st.composite
def jobs(draw: st.DrawFn, most: int = 12) -> list[Job]:
    """Requests of some tenants, sessions, programs and deadlines, many with a prefix in common, some cancelled."""
    prefixes = [[7] * 40, [9] * 20 + [3] * 30]
    made: list[Job] = []
    for i in range(draw(st.integers(1, most))):
        prompt, output, arrives = draw(st.integers(1, 60)), draw(st.integers(1, 40)), draw(st.integers(0, 30))
        own = draw(st.integers(0, 60))
        prefix = draw(st.sampled_from(prefixes))
        tokens = (prefix[: prompt - own if prompt > own else 0] + [100 + i] * 200)[:prompt]
        made.append(
            StampedJob(
                prompt,
                output,
                arrives,
                output + draw(st.integers(0, 9)),
                tuple(block_keys(tokens + [1000 + i] * output, 4)),
                draw(st.one_of(st.none(), st.none(), st.integers(0, 60))),
                draw(st.integers(0, 2)),
                draw(st.sampled_from(["", "a", "b"])),
                draw(st.sampled_from([None, 0, 1])),
                draw(st.sampled_from([None, 0, 1])),
                draw(SLOS),
                stamp=arrives * STEP_NS + i,
            )
        )
    return made


LIMITS = st.builds(
    lambda blocks, budget, caching, lag, host: Limits(
        blocks, 4, 6, budget, 110, prefix_caching=caching, lag=lag, num_host_blocks=host
    ),
    st.sampled_from([28, 40, 400]),
    st.sampled_from([12, 32]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 12, 100]),
)


@pytest.mark.parametrize("stack", EVERY, ids=says)
@settings(max_examples=5, deadline=None)
@given(LIMITS, jobs())
def test_every_request_ends_with_its_tokens(stack: StackSpec, limits: Limits, work: list[Job]) -> None:
    drive = Drive(limits, stack, work)
    rows = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests}
    assert sorted(rows) == list(range(len(work)))
    for i, job in enumerate(work):
        row = rows[i]
        if row["status"] in ("stop", "length"):
            assert row["output_tokens"] == job.output
            runs = row["decode_runs"]
            counted = len(row["token_steps"]) + sum(b - a for a, b in zip(runs[::2], runs[1::2], strict=True))
            assert job.output <= counted <= job.output + limits.lag + row["preemptions"] * limits.lag
        elif row["status"] == "dropped":
            assert job.slo is not None
            assert job.slo.droppable
        else:
            assert row["status"] == "refused" or (row["status"] == "cancelled" and job.cancel is not None)
    assert drive.plane.view.num_free_host_blocks == limits.num_host_blocks
    assert drive.plane.view.num_free_blocks + sum(r.num_blocks for r in drive.requests) == limits.num_blocks
    for row in drive.log.steps:
        step = dict(zip(STEPS, row, strict=True))
        assert step["num_decodes"] + step["chunk_tokens"] <= limits.max_num_batched_tokens
        assert step["num_running"] <= limits.max_num_seqs
    assert not [row for row in drive.log.decisions if dict(zip(DECISIONS, row, strict=True))["kind"] == "refused"]
    assert Drive(limits, stack, work, check=False).log == drive.log


@pytest.mark.parametrize("stack", [s for s in EVERY if not any(name in says(s) for name in DRAWS)], ids=says)
@settings(max_examples=2, deadline=None)
@given(LIMITS, jobs(most=8), st.data())
def test_other_ids_and_another_order_of_submission_change_no_decision(
    stack: StackSpec, limits: Limits, work: list[StampedJob], data: st.DataObject
) -> None:
    names = data.draw(st.permutations(range(len(work))), label="names")
    shuffled: list[Job] = [work[0]] * len(work)
    for i, name in enumerate(names):
        shuffled[name] = work[i]
    plain, other = (StampedDrive(limits, stack, each, check=False) for each in (list(work), shuffled))
    for a, b in zip(renamed(decisions(plain), names), decisions(other), strict=True):
        assert a == b
    fates = sorted((names[row[0]], *row[1:]) for row in outcomes(plain))  # type: ignore[call-overload]
    assert fates == outcomes(other)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stack", EVERY, ids=says)
def test_in_little_memory_everybody_still_ends(stack: StackSpec, lag: int) -> None:
    work = [Job(20, 40, priority=i % 2, tenant="ab"[i % 2], program=i % 3, session=i) for i in range(6)]
    drive = Drive(Limits(30, 4, 6, 32, 110, prefix_caching=False, lag=lag, num_host_blocks=40), stack, work)
    assert all(request.state.value == "length" for request in drive.requests)
