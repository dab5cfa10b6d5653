"""SCORPIO: who is admitted by the virtual batch, and who decodes by credit."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.control_plane import ControlPlane
from policies.costing import decode_ns
from policies.plan import Report, Step
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.schedulers.scorpio import TPOT_GUARD, Scorpio, VirtualBatch
from policies.shapes import StepShape
from policies.stack import StackSpec
from tests.policies.decisions import assert_same_run, decisions
from tests.policies.harness import STEP_NS, Drive, Job, LinearCost
from tests.policies.test_library import jobs

AMPLE = Limits(4096, 4, 64, 256, 4096, prefix_caching=False)
SCORPIO = StackSpec("scorpio")
LONG = 10**9
"""A TPOT, in nanoseconds, that binds nobody."""


def paced(output: int, tpot: int | None, arrives: int = 0, **slo: object) -> Job:
    return Job(4, output, arrives, slo=Slo(tpot_ns=tpot, **slo))  # type: ignore[arg-type]


def decoding_steps(drive: Drive, i: int) -> list[int]:
    """The steps in which request i decodes; its first token comes with its prefill."""
    prefill = max(d.step for d in decisions(drive) for j, _, _ in d.chunks if j == i)
    return [d.step for d in decisions(drive) if i in d.tokens and d.step > prefill]


# Credits


@pytest.mark.parametrize("lag", [0, 1])
def test_who_has_k_times_the_tightest_tpot_decodes_in_exactly_every_kth_step(lag: int) -> None:
    limits = dataclasses.replace(AMPLE, lag=lag)
    work = [paced(61, LONG), paced(31, 2 * LONG), paced(21, 3 * LONG), paced(25, 5 * LONG // 2)]
    drive = Drive(limits, SCORPIO, work)
    assert decoding_steps(drive, 0)[:60] == list(range(1, 61))
    assert decoding_steps(drive, 1)[:30] == list(range(2, 61, 2))
    assert decoding_steps(drive, 2)[:20] == list(range(3, 61, 3))
    assert decoding_steps(drive, 3)[:24] == [math.ceil(k * 5 / 2) for k in range(1, 25)]


def test_when_the_tightest_leaves_the_next_one_sets_the_pace() -> None:
    drive = Drive(AMPLE, SCORPIO, [paced(11, LONG), paced(31, 2 * LONG)])
    assert decoding_steps(drive, 0) == list(range(1, 11))
    assert decoding_steps(drive, 1) == [2, 4, 6, 8, 10, *range(11, 36)]


def test_requests_without_a_tpot_decode_in_every_step() -> None:
    drive = Drive(AMPLE, SCORPIO, [paced(31, LONG), paced(16, 2 * LONG), Job(4, 31), paced(31, 1)])
    assert decoding_steps(drive, 1) == list(range(2, 31, 2))
    assert decoding_steps(drive, 2) == list(range(1, 31))
    assert decoding_steps(drive, 3) == list(range(1, 31)), "one step of its own takes longer than its TPOT"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 30), st.integers(0, 12)), min_size=1, max_size=8))
def test_credits_are_those_of_the_definition(drawn: list[tuple[int, int, int]]) -> None:
    """Each step each decode earns tightest / own, exactly; it decodes at 1 and pays 1."""
    drive = Drive(AMPLE, SCORPIO, [paced(output, tpot * LONG, at) for tpot, output, at in drawn])
    credit: dict[int, Fraction] = {}
    alive: dict[int, int] = {}  # running request -> tokens it still has to get
    for decision in decisions(drive):
        tight = min((drawn[i][0] for i in alive), default=0)
        prefilled = {i for i, _, _ in decision.chunks}
        decoded = {i for i in decision.tokens if i not in prefilled}
        expected = set()
        for i in alive:
            credit[i] = credit.get(i, Fraction(0)) + Fraction(tight, drawn[i][0])
            if credit[i] >= 1:
                credit[i] -= 1
                expected.add(i)
        assert decoded == expected
        for i in decision.admitted:
            alive[i] = drawn[i][1]
        for i in decision.tokens:
            alive[i] -= 1
        alive = {i: left for i, left in alive.items() if left}


@settings(max_examples=20, deadline=None)
@given(jobs(), st.sampled_from([28, 400]), st.sampled_from([0, 1]), st.booleans())
def test_with_equal_tpots_and_nobody_rejected_it_decides_exactly_as_mixed(
    work: list[Job], blocks: int, lag: int, caching: bool
) -> None:
    equal = [dataclasses.replace(job, slo=Slo(tpot_ns=LONG)) for job in work]
    limits = Limits(blocks, 4, 6, 32, 110, prefix_caching=caching, lag=lag)
    assert_same_run(limits, equal, SCORPIO, StackSpec("mixed"))
    assert_same_run(limits, [dataclasses.replace(job, slo=None) for job in work], SCORPIO, StackSpec("mixed"))


# Admission


class PerSequence:
    """1000 ns a step and 100 ns a sequence in it."""

    def step_ns(self, shape: StepShape) -> int:
        return 1000 + 100 * shape.padded_tokens


def how_many(*tpots: int | None) -> int:
    """How many of these, in turn, the guard lets in."""
    batch = VirtualBatch()
    for count, tpot in enumerate(tpots):
        if not batch.allows(tpot, 8, PerSequence()):
            return count
        batch.add(tpot, 8)
    return len(tpots)


def test_the_virtual_batch_is_worked_by_hand() -> None:
    """At 1500 ns a token 5 fit into a step. Those with 3000 count half, as long as somebody with 1500 runs."""
    assert how_many(*[1500] * 9) == 5
    assert how_many(1500, *[3000] * 19) == 1 + 8
    assert how_many(*[3000] * 30) == 20, "at 3000 ns a token 20 fit"
    assert how_many(*[3000] * 8, 1500) == 9, "4 + 1"
    assert how_many(*[3000] * 9, 1500) == 9, "4.5 + 1: six sequences in some steps"
    assert how_many(1500, *[None] * 9) == 5, "without a TPOT: a whole place in the step"
    assert how_many(*[None] * 50) == 50
    batch = VirtualBatch()
    for tpot, context in ((1500, 100), (3000, 40), (None, 7)):
        batch.add(tpot, context)
    assert (batch.size(), batch.context()) == (pytest.approx(2.5), pytest.approx(100 + 20 + 7))


def test_one_request_alone_is_always_let_in() -> None:
    assert VirtualBatch().allows(1, 8, PerSequence())


PACED = st.tuples(st.integers(300, 900), st.integers(1, 30), st.integers(1, 40), st.integers(0, 25))
"""TPOT in nanoseconds, prompt, output, arrival."""


@settings(max_examples=40, deadline=None)
@given(st.lists(PACED, min_size=1, max_size=12), st.sampled_from([0, 1]))
def test_no_admission_brings_the_virtual_batch_beyond_the_tightest_tpot(
    drawn: list[tuple[int, int, int, int]], lag: int
) -> None:
    """Reckoned anew, slowly and exactly, at each admission beside others."""
    seen = 0

    class Watched(Drive):
        def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
            nonlocal seen
            if step.admitted and len(self.plane.view.running) > 1:
                cost = LinearCost()
                running = list(self.plane.view.running.values())
                tpots = {r.id: drawn[r.id][0] for r in running}
                tight = min(tpots.values())
                size = sum(Fraction(tight, tpots[r.id]) for r in running)
                # This step's tokens are not in the contexts that the guard saw, nor are the chunks of new ones.
                context = sum(Fraction(tight, tpots[r.id]) * (r.num_tokens - 1) for r in running)
                assert decode_ns(cost, math.ceil(size), round(context - len(running))) <= tight
                seen += 1
            return super()._execute(step)

    limits = dataclasses.replace(AMPLE, lag=lag)
    work = [Job(prompt, output, at, slo=Slo(tpot_ns=tpot)) for tpot, prompt, output, at in drawn]
    drive = Watched(limits, SCORPIO, work)
    assert all(r.state.value == "length" for r in drive.requests)


def test_with_equal_tpots_no_decode_step_takes_longer_than_the_tpot_and_the_rest_waits() -> None:
    """200 ns, 20 a token, 1 a token of context: 6 requests with contexts from 10 to 12 take 380 to 392, 7 from 410."""
    drive = Drive(AMPLE, SCORPIO, [Job(10, 3, slo=Slo(tpot_ns=395)) for _ in range(12)])
    costs = [LinearCost().step_ns(step.shape) for step in drive.steps if step.num_decodes and not step.chunks]
    assert max(costs) <= 395
    assert max(len(d.tokens) for d in decisions(drive)) == 6
    assert any(TPOT_GUARD in row for row in drive.log.decisions)
    mixed = Drive(AMPLE, StackSpec("mixed"), drive.jobs)
    assert max(LinearCost().step_ns(step.shape) for step in mixed.steps if not step.chunks) > 395


# The TTFT guard, and what is kept


def test_the_ttft_guard_goes_by_deadline_and_rejects_the_lost() -> None:
    limits = dataclasses.replace(AMPLE, max_num_seqs=1)
    work = [
        paced(6, LONG),
        paced(6, LONG, 1, ttft_ns=90_000, droppable=True),
        paced(6, LONG, 1, ttft_ns=50_000, droppable=True),
        paced(6, LONG, 1, ttft_ns=2_000, droppable=True),
    ]
    drive = Drive(limits, SCORPIO, work)
    assert [i for d in decisions(drive) for i in d.admitted] == [0, 2, 1]
    assert [drive.status(i) for i in range(4)] == ["length", "length", "length", "dropped"]


@settings(max_examples=15, deadline=None)
@given(jobs(), st.sampled_from([28, 400]), st.sampled_from([0, 1]))
def test_nothing_is_kept_of_requests_that_have_ended(work: list[Job], blocks: int, lag: int) -> None:
    drive = Drive(Limits(blocks, 4, 6, 32, 110, lag=lag), SCORPIO, work)
    scheduler = drive.stack.scheduler
    assert isinstance(scheduler, Scorpio)
    assert not scheduler._tpot
    assert not scheduler._joined


def test_a_request_that_never_ran_here_decodes_from_when_it_is_first_seen() -> None:
    """Put in place while others run: it finds them in the view."""
    scheduler = Scorpio()
    requests = [Request(i, 0, 4, 50, slo=Slo(tpot_ns=(i + 1) * LONG)) for i in range(2)]
    plane = ControlPlane(AMPLE, StackSpec().build(block_size=4), cost=LinearCost(), check=True)
    for request in requests:
        plane.submit(request, 0)
    decoded, now = [], 0
    for index in range(12):
        if index == 5:
            plane.change_policies({"scheduler": scheduler}, {"scheduler": "scorpio"}, now)
        before = [r.num_output_tokens for r in requests]
        step = plane.plan(now)
        decoded.append([r.num_output_tokens - n for r, n in zip(requests, before, strict=True)])
        now += STEP_NS
        plane.report(Report(step, now - STEP_NS, now, STEP_NS))
    assert decoded == [[1, 1]] * 5 + [[1, 0], [1, 1]] * 3 + [[1, 0]]


def test_a_preempted_request_saves_no_credit_while_it_waits() -> None:
    scheduler, request = Scorpio(), Request(0, 0, 4, 50, slo=Slo(tpot_ns=2 * LONG))
    scheduler._joined[0] = (0, 1)
    scheduler.add(request, 9)
    assert not scheduler._joined
