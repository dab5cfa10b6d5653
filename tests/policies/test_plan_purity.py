"""Oracle A3: decisions follow from the requests and the time, not from ids, insertion order or who asked before."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.control_plane import RequestRefused
from policies.plan import Plan
from policies.prefix import block_keys
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.decisions import Decision, decisions, outcomes
from tests.policies.harness import Drive, Job

SCHEDULERS = ["mixed", "mixed,long_prefill_threshold=5", "sarathi,chunk_size=12", "prefill_first", "static"]
QUEUES = ["fcfs", "priority", "sjf", "sjf,predictor=oracle"]
ADMISSIONS = ["full_prompt", "watermark,watermark=0", "reserve_max"]


@dataclass
class StampedJob(Job):
    """A job with an arrival time of its own, so that no tie is left for the ids to break."""

    stamp: int = field(default=0)


class StampedDrive(Drive):
    """Submits in the order of the ids whatever the stamps are, as if the panel had found them in that order."""

    def _order(self, i: int) -> tuple[int, int]:
        job = self.jobs[i]
        assert isinstance(job, StampedJob)
        return job.stamp, i

    def _deliver(self, now: int) -> None:
        index = self.plane.next_step
        due = [i for i in self._left_to_arrive if self.jobs[i].arrives <= index]
        if not due and not self.plane.num_live and self._left_to_arrive:
            first = min(self.jobs[i].arrives for i in self._left_to_arrive)
            due = [i for i in self._left_to_arrive if self.jobs[i].arrives == first]
        for i in sorted(due):
            self._left_to_arrive.remove(i)
            job = self.jobs[i]
            assert isinstance(job, StampedJob)
            self.requests[i].arrival_ns = job.stamp
            try:
                self.plane.submit(self.requests[i], now, job.keys)
            except RequestRefused as refusal:
                self.refused[i] = str(refusal)
        cancelled = [(at, i) for at, i in self._cancels if at <= index]
        self._cancels = [pair for pair in self._cancels if pair not in cancelled]
        for _, i in cancelled:
            self.plane.cancel(i, now)


def renamed(made: list[Decision], names: list[int]) -> list[Decision]:
    """The same decisions with request i called names[i]."""
    return [
        Decision(
            d.step,
            {names[i]: n for i, n in d.tokens.items()},
            [(names[i], start, n) for i, start, n in d.chunks],
            [names[i] for i in d.admitted],
            [names[i] for i in d.preempted],
            d.wake_at,
        )
        for d in made
    ]


@st.composite
def jobs(draw: st.DrawFn) -> list[StampedJob]:
    made = []
    for i in range(draw(st.integers(2, 10))):
        prompt, output, arrives = draw(st.integers(1, 40)), draw(st.integers(1, 30)), draw(st.integers(0, 20))
        shared = draw(st.sampled_from([0, 8, 30]))
        tokens = ([7] * min(shared, prompt) + [100 + i] * 60)[:prompt] + [1000 + i] * output
        keys = tuple(block_keys(tokens, 4))
        priority = draw(st.integers(0, 2))
        made.append(StampedJob(prompt, output, arrives, output + 3, keys, None, priority, stamp=arrives * 100 + i))
    return made


LIMITS = st.builds(
    lambda blocks, budget, caching, lag: Limits(blocks, 4, 6, budget, 110, prefix_caching=caching, lag=lag),
    st.sampled_from([22, 30, 400]),
    st.sampled_from([12, 40]),
    st.booleans(),
    st.sampled_from([0, 1]),
)
STACKS = st.builds(StackSpec, st.sampled_from(SCHEDULERS), st.sampled_from(QUEUES), st.sampled_from(ADMISSIONS))


@settings(max_examples=100, deadline=None)
@given(LIMITS, jobs(), STACKS, st.data())
def test_other_ids_and_another_order_of_submission_change_no_decision(
    limits: Limits, work: list[StampedJob], stack: StackSpec, data: st.DataObject
) -> None:
    names = data.draw(st.permutations(range(len(work))), label="names")
    shuffled: list[Job] = [work[0]] * len(work)
    for i, name in enumerate(names):
        shuffled[name] = work[i]
    plain, other = StampedDrive(limits, stack, list(work)), StampedDrive(limits, stack, shuffled)
    for a, b in zip(renamed(decisions(plain), names), decisions(other), strict=True):
        assert a == b
    fates = sorted((names[row[0]], *row[1:]) for row in outcomes(plain))  # type: ignore[call-overload]
    assert fates == outcomes(other)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("found", [[0, 1], [1, 0]])
def test_of_requests_that_end_together_the_first_to_arrive_gives_its_blocks_up_first(
    swap: bool, found: list[int]
) -> None:
    """Whatever their ids are and whichever the panel found first: it decides whose blocks are evicted first."""
    desk = Desk(Limits(4, 4, 4, 32, 16))
    chains = [tuple(block_keys([i] * 8, 4)) for i in (0, 1)]
    requests = [Request(1 - i if swap else i, i, 8, 4) for i in (0, 1)]
    desk.now = 5
    for request, keys in zip(requests, chains, strict=True):
        desk.plane.submit(request, desk.now, keys)
    desk.run(Plan(chunks=[(r, 8) for r in requests]), *(requests[i] for i in found))
    late = Request(2, 10, 8, 4)
    desk.plane.submit(late, desk.now)
    desk.run(Plan(chunks=[(late, 8)]))
    assert [desk.plane.match(keys) for keys in chains] == [0, 2]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_asking_what_could_be_done_changes_nothing(scheduler: str) -> None:
    """Drafts that are thrown away and probes between the steps leave the run as it is."""

    class Nosy(Drive):
        def _deliver(self, now: int) -> None:
            super()._deliver(now)
            view = self.plane.view
            draft = view.draft()
            draft.run_everyone()
            for request in self.requests:
                if request.state.value == "waiting" and request.num_computed_tokens == 0:
                    view.probe(request)
                    draft.admit(request)
            view.decodes_that_need_a_block()
            list(view.decoding())
            for request in view.running.values():
                view.num_freed_by(request, {})

    keys = tuple(block_keys([7] * 24, 4))
    work = [Job(24, 12, arrives=2 * i, keys=keys) for i in range(6)]
    limits = Limits(24, 4, 4, 30, 60)
    plain, nosy = (kind(limits, StackSpec(scheduler), work) for kind in (Drive, Nosy))
    assert decisions(plain) == decisions(nosy)
    assert outcomes(plain) == outcomes(nosy)
