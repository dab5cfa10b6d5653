"""PLAS and ATLAS: what programs are charged, where their calls go, and what that comes to."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.alarms import Alarms
from policies.plan import Chunk, Report, Step
from policies.program_queue import ProgramQueue
from policies.queues.atlas import Atlas
from policies.queues.plas import Plas
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.service_time import ServiceTime
from policies.stack import StackSpec
from tests.policies.decisions import decisions, outcomes
from tests.policies.harness import STEP_NS, Drive, Job
from tests.policies.programs import Call, ProgramDrive, chains

HERE = "tests.policies.test_program_queues:"
PUBLISHED = "experiments.published.agentix.charged:"
LIMITS = Limits(400, 4, 2, 64, 110, prefix_caching=False, lag=0)
FIGURE_2 = chains((4, 3, 1, 1), (3, 3, 4), (1, 2), (4,))
"""Programs A, B, C, D of the paper's figure 2; lengths of calls in units of time, which are steps here."""
FINE = "quantum_ms=0.001,factor=1,levels=20,beta=0"
"""Levels as wide as a step."""


def queue_of(drive: Drive) -> ProgramQueue:
    queue = drive.stack.scheduler.queue  # type: ignore[attr-defined]
    assert isinstance(queue, ProgramQueue)
    return queue


@pytest.mark.parametrize(
    ("scheduler", "queue", "waits"),
    [
        ("mixed", "fcfs", 18),  # as published
        ("preemptive,mode=keep", "fcfs", 18),
        ("preemptive,mode=keep", "mlfq,quantum_ms=0.004,alpha_ms=0", 18),  # as published; no call outlives a quantum
        ("preemptive,mode=keep", "mlfq,quantum_ms=0.001,alpha_ms=0", 15),
        ("preemptive,mode=keep", f"{PUBLISHED}ChargedAtOnce", 12),  # PLAS as published
        ("preemptive,mode=keep", f"{PUBLISHED}ChargedAtOnce,goes_on=false", 13),
        ("preemptive,mode=keep", f"plas,{FINE},demote=false", 14),
        ("mixed", f"plas,{FINE},demote=false", 14),
        ("preemptive,mode=keep", f"plas,{FINE}", 14),
        ("preemptive,mode=keep", "plas,quantum_ms=0.002,factor=1,levels=20,beta=0", 13),
        ("preemptive,mode=keep", f"atlas,{FINE}", 14),
    ],
)
def test_of_figure_2_each_charging_rule_makes_its_own_sum_of_waits(scheduler: str, queue: str, waits: int) -> None:
    """Oracle E1: all at time 0, two at a time, ties in the order A, B, C, D."""
    assert ProgramDrive(LIMITS, StackSpec(scheduler, queue), FIGURE_2).waited() == waits


# Equivalences


@st.composite
def programs(draw: st.DrawFn, named: bool = True) -> list[Call]:
    """Chains, with prompts, gaps, some cancelled calls and some that come by themselves."""
    made: list[Call] = []
    for program in range(draw(st.integers(1, 6))):
        for i in range(draw(st.integers(1, 4))):
            prompt, output = draw(st.integers(1, 30)), draw(st.integers(1, 20))
            after = (len(made) - 1,) if i else ()
            gap, arrives = draw(st.integers(0, 8)), draw(st.integers(0, 20))
            cancel = draw(st.sampled_from([None, None, None, 10, 25]))
            made.append(
                Call(prompt, output, arrives, cancel=cancel, program=program, after=after, gap=gap, named=named)
            )
    return made


MEMORY = st.builds(
    lambda blocks, seqs, lag: Limits(blocks, 4, seqs, 32, 110, prefix_caching=False, lag=lag),
    st.sampled_from([28, 60, 400]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0, 1]),
)
SMALL = "quantum_ms=0.003,factor=1.5,levels=6"


def assert_alike(limits: Limits, calls: list[Call], one: StackSpec, other: StackSpec) -> None:
    first, second = ProgramDrive(limits, one, calls), ProgramDrive(limits, other, calls)
    assert decisions(first) == decisions(second)
    assert outcomes(first) == outcomes(second)


@pytest.mark.parametrize("queue", ["plas", "atlas"])
@settings(max_examples=20, deadline=None)
@given(limits=MEMORY, calls=programs(), mode=st.sampled_from(["keep", "recompute"]))
def test_of_programs_of_one_call_and_without_quanta_they_are_first_come_first_served(
    queue: str, limits: Limits, calls: list[Call], mode: str
) -> None:
    for i, call in enumerate(calls):
        call.program, call.after = (None, i)[i % 2], ()
    scheduler = f"preemptive,mode={mode}"
    assert_alike(limits, calls, StackSpec(scheduler, f"{queue},{SMALL},demote=false"), StackSpec(scheduler, "fcfs"))


def test_with_quanta_or_longer_programs_they_are_not() -> None:
    one_call = [Job(4, 12, program=i) for i in range(5)]
    limits, queue = Limits(400, 4, 2, 32, 110), "plas,quantum_ms=0.003,levels=6"
    with_quanta, fcfs = (Drive(limits, StackSpec("preemptive", q), one_call) for q in (queue, "fcfs"))
    assert decisions(with_quanta) != decisions(fcfs)


@settings(max_examples=30, deadline=None)
@given(MEMORY, programs(), programs(named=False), st.sampled_from(["keep", "recompute"]), st.sampled_from([0, 2]))
def test_of_chains_atlas_decides_as_plas_whether_they_name_their_parents_or_not(
    limits: Limits, calls: list[Call], unnamed: list[Call], mode: str, beta: int
) -> None:
    for work in (calls, unnamed):
        one, other = (StackSpec(f"preemptive,mode={mode}", f"{q},{SMALL},beta={beta}") for q in ("plas", "atlas"))
        assert_alike(limits, work, one, other)


class SlowPlas(Plas):
    """Looks at everybody: in every report for quanta used up, in every plan for those who starve."""

    def __init__(self, quantum_ms: float, factor: float, levels: int, beta: float) -> None:
        super().__init__(quantum_ms, factor, levels, beta)
        self._used_up = self._starved = Never()

    def on_report(self, report: Report) -> None:
        self._now = report.end_ns
        for request in (*report.step.admitted, *report.step.resumed):
            if not request.state.ended:
                self._live[request.id] = request
        ServiceTime.on_report(self._service, report)
        for name, request in sorted(self._live.items()):
            if not request.state.ended or any(request is r for r, _, _ in report.finished):
                self._sink(request, report.end_ns)
            if request.state.ended:
                del self._live[name]
        for request, _, _ in report.finished:
            self._end(request)

    def begin(self, draft: object, now: int) -> None:
        for _, _, _, request in list(self._waiting.values()):
            call = self._calls[request.id]
            assert call.since is not None
            wait = call.wait + call.waited + now - call.since
            served = call.time + self._service.of(request) - call.promoted
            if self._beta and call.level > 0 and wait >= self._beta * served:
                call.level, call.entered, call.meter = 0, now, self._service.of(request)
                call.since, call.waited = now, 0
                if request.num_output_tokens > call.outputs:
                    call.promoted = self._service.of(request)
                self.rerank(request, now)

    _live: dict[int, Request]

    def push(self, request: Request, now: int) -> None:
        if not hasattr(self, "_live"):
            self._live = {}
        super().push(request, now)


class Never(Alarms):
    def set(self, request: Request, time: int) -> None:
        pass


@settings(max_examples=75, deadline=None)
@given(MEMORY, programs(), st.sampled_from(["keep", "recompute"]), st.sampled_from([0.0, 0.5, 2.0]))
def test_alarms_find_whom_a_look_at_everybody_finds(limits: Limits, calls: list[Call], mode: str, beta: float) -> None:
    one, other = (StackSpec(f"preemptive,mode={mode}", f"{q},{SMALL},beta={beta}") for q in ("plas", f"{HERE}SlowPlas"))
    assert_alike(limits, calls, one, other)


# What is charged

FORK = [
    Call(1, 2, program=7),
    Call(1, 3, program=7, after=(0,)),
    Call(1, 9, program=7, after=(0,)),
    Call(1, 4, program=7, after=(1,)),
    Call(1, 1, program=7, after=(2, 3)),
]
"""0 -> 1 -> 3 -> 4 and 0 -> 2 -> 4, with 2, 3, 9, 4 and 1 steps."""


def starts(queue: str, calls: list[Call]) -> tuple[list[int], int]:
    """With how many steps of service each call came; with how many the program's next one would come."""
    seen: dict[int, int] = {}

    class Watched(ProgramDrive):
        def _deliver(self, now: int) -> None:
            super()._deliver(now)
            seen.update((i, call.start // STEP_NS) for i, call in queue_of(self)._calls.items())

    drive = Watched(LIMITS.__class__(400, 4, 6, 64, 110), StackSpec("preemptive", queue), calls)
    return [seen[i] for i in sorted(seen)], queue_of(drive)._programs[7].service // STEP_NS


def test_plas_charges_a_program_the_sum_of_its_ended_calls() -> None:
    assert starts("plas", FORK) == ([0, 2, 2, 5, 18], 19)


def test_atlas_charges_it_the_longest_path_through_the_parents() -> None:
    assert starts("atlas", FORK) == ([0, 2, 2, 5, 11], 12)


def test_without_parents_atlas_goes_by_the_longest_path_seen_so_far() -> None:
    unnamed = [Call(c.prompt, c.output, program=7, after=c.after, named=False) for c in FORK]
    assert starts("atlas", unnamed) == ([0, 2, 2, 5, 11], 12)
    late = [*FORK[:3], Call(1, 4, program=7, after=(1, 2), named=False)]
    assert starts("atlas", late) == ([0, 2, 2, 11], 15)


def test_a_short_branch_is_not_taken_for_a_long_one_where_parents_are_named() -> None:
    short = [*FORK[:3], Call(1, 4, program=7, after=(1,), gap=20)]  # comes when the long branch has ended
    assert starts("atlas", short) == ([0, 2, 2, 5], 11)
    short[3].named = False
    assert starts("atlas", short) == ([0, 2, 2, 11], 15)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_cancelled_call_is_charged_what_it_was_served(lag: int) -> None:
    calls = [Call(1, 30, program=7, cancel=6), Call(1, 2, program=8)]
    drive = ProgramDrive(Limits(400, 4, 6, 64, 110, lag=lag), StackSpec("preemptive", "plas"), calls)
    assert queue_of(drive)._programs[7].service == (6 - lag) * STEP_NS
    assert queue_of(drive)._programs[8].service == 2 * STEP_NS


def test_service_before_a_preemption_counts() -> None:
    calls = [Call(8, 10, program=7, arrives=0), Call(8, 3, 4, program=8)]
    limits = Limits(400, 4, 1, 64, 110, prefix_caching=False)
    drive = ProgramDrive(limits, StackSpec("preemptive", "plas,quantum_ms=0.003"), calls)
    assert drive.requests[0].num_preemptions == 1
    assert queue_of(drive)._programs[7].service == (10 + 0) * STEP_NS
    assert queue_of(drive)._programs[8].service == 3 * STEP_NS


# Levels, starvation, memory


def waiting(queue: ProgramQueue, request_id: int, program: int | None, now: int = 0, parents: tuple = ()) -> Request:
    request = Request(request_id, now, 4, 50, program=program, parents=parents)
    queue.push(request, now)
    return request


def end(queue: ProgramQueue, request: Request, served: int, now: int) -> None:
    queue._service._own[request.id] = served
    request.state, request.finish_ns = State.STOPPED, now
    queue._end(request)


@pytest.mark.parametrize(("steps", "level"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (13, 2), (14, 3), (999, 3)])
def test_a_call_joins_the_level_in_whose_range_its_programs_service_lies(steps: int, level: int) -> None:
    queue = Plas(quantum_ms=0.002, levels=4)  # [0, 2) [2, 6) [6, 14) [14, ...) in steps
    end(queue, waiting(queue, 0, 5), steps * STEP_NS, 0)
    assert queue.level(waiting(queue, 1, 5)) == level
    assert queue.level(waiting(queue, 2, 6)) == 0
    assert queue.level(waiting(queue, 3, None)) == 0


def test_a_call_has_the_whole_quantum_of_its_level_and_sinks_when_it_is_used_up() -> None:
    calls = [Call(1, 5, program=7), Call(1, 9, program=7, after=(0,)), Call(1, 40, program=8)]
    levels = []

    class Watched(ProgramDrive):
        def _deliver(self, now: int) -> None:
            super()._deliver(now)
            queue = queue_of(self)
            levels.extend(queue.level(r) for r in self.requests if r.id == 1 and r.id in queue._calls)

    Watched(LIMITS, StackSpec("preemptive", "plas,quantum_ms=0.002,factor=2,levels=9"), calls)
    assert levels == [1] * 4 + [2] * 5  # 5 steps of service: level 1, [2, 6), whose quantum is 4


def test_who_is_stopped_sinks_all_the_same_when_the_step_in_flight_is_reported() -> None:
    queue = Plas(quantum_ms=0.002)
    first, second = waiting(queue, 0, 1), waiting(queue, 1, 2)
    assert queue.pop(0) is first
    first.state = State.RUNNING
    chunk = Chunk(first, 0, 4, True)
    queue.on_report(Report(Step(0, 0, chunks=[chunk], admitted=[first]), 0, 1_500, 0))
    first.state = State.WAITING
    queue.push(first, 1_500)
    assert queue.peek(0) is first
    queue.on_report(Report(Step(1, 0, decodes=[first]), 1_500, 3_000, 0))
    assert queue.level(first) == 1
    assert queue.peek(0) is second
    assert queue._starves_at(first, queue._calls[0]) == 1_500 + 10 * 3_000
    queue.begin(Desk(), 40_000)  # type: ignore[arg-type]
    assert queue.level(first) == 0


@pytest.mark.parametrize(("beta", "promoted"), [(1.0, True), (3.0, True), (0.0, False)])
def test_who_waits_beta_times_as_long_as_it_was_served_goes_to_the_top(beta: float, promoted: bool) -> None:
    queue = Plas(quantum_ms=0.002, levels=4, beta=beta)
    first = waiting(queue, 0, 5, now=0)
    assert queue.pop(1_500) is first  # W_p = 1,500
    end(queue, first, 4_000, 9_000)  # T_p = 4,000
    second = waiting(queue, 1, 5, now=10_000)
    ahead = waiting(queue, 2, 6, now=20_000)
    due = 10_000 + round(beta * 4_000) - 1_500
    draft = Desk()
    queue.begin(draft, due - 1)  # type: ignore[arg-type]
    assert queue.level(second) == 1
    assert queue.peek(0) is ahead
    queue.begin(draft, due)  # type: ignore[arg-type]
    assert queue.level(second) == (0 if promoted else 1)
    queue.begin(draft, 10**12)  # type: ignore[arg-type]
    assert queue.level(second) == (0 if promoted else 1)
    assert queue.peek(0) is ahead or due < 20_000


class Desk:
    """What a queue sees of a replica on which nothing runs."""

    class View:
        running: dict[int, Request] = {}  # noqa: RUF012

        def decoding(self) -> list[Request]:
            return []

    view = View()


def test_a_promoted_calls_meters_start_anew() -> None:
    queue = Plas(quantum_ms=0.002, levels=4, beta=1)
    first = waiting(queue, 0, 5)
    queue.pop(0)
    end(queue, first, 4_000, 4_000)
    second = waiting(queue, 1, 5, now=5_000)
    queue.begin(Desk(), 9_000)  # type: ignore[arg-type]
    assert queue.level(second) == 0
    queue.pop(9_700)
    end(queue, second, 1_000, 11_000)
    program = queue._programs[5]
    assert (program.service, program.time, program.wait) == (5_000, 5_000, 700)


@pytest.mark.parametrize("name", ["plas", "atlas"])
def test_only_so_many_programs_are_remembered_those_heard_of_last(name: str) -> None:
    queue = registry.make("queue", f"{name},remember=3,quantum_ms=0.001")
    end(queue, waiting(queue, 899, 0), 5_000, 0)
    alive = waiting(queue, 900, 0)
    for i in range(1, 5):
        end(queue, waiting(queue, i, i), 10_000, 0)
        if i == 3:
            assert queue.level(waiting(queue, 50, 1)) == 3  # 1 + 2 + 4 <= 10 < 15
    assert sorted(queue._programs) == [1, 3, 4]
    assert queue.level(waiting(queue, 51, 2)) == 0  # forgotten
    end(queue, alive, 2_000, 0)
    assert queue._programs[0].service == 7_000  # it knew what it came with
    assert len(queue._programs) == 3
    assert len(getattr(queue, "_paths", {})) <= 3


@pytest.mark.parametrize("name", ["plas", "atlas"])
@settings(max_examples=20, deadline=None)
@given(limits=MEMORY, calls=programs(), mode=st.sampled_from(["keep", "recompute"]))
def test_nothing_is_kept_of_calls_that_have_ended(name: str, limits: Limits, calls: list[Call], mode: str) -> None:
    calls.append(Call(1, 30, 5))  # so that there are reports after the last cancellation
    drive = ProgramDrive(limits, StackSpec(f"preemptive,mode={mode}", f"{name},{SMALL}"), calls)
    queue = queue_of(drive)
    assert not queue._calls
    assert not queue._waiting
    assert not queue._used_up._set
    assert not queue._starved._set
    assert not queue._service._joined_at
    assert not queue._service._own


def test_a_prompt_is_not_stopped_midway() -> None:
    calls = [Call(60, 4, program=i) for i in range(2)]
    limits = Limits(400, 4, 1, 8, 110, prefix_caching=False)
    drive = ProgramDrive(limits, StackSpec("preemptive", "plas,quantum_ms=0.003,factor=1,levels=20"), calls)
    assert decisions(drive)[0].tokens == {0: 8}
    assert max(request.num_preemptions for request in drive.requests) <= 4
    first_stop = next(d.step for d in decisions(drive) if d.preempted)
    assert sum(tokens for d in decisions(drive)[:first_stop] for tokens in d.tokens.values()) >= 60


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@settings(max_examples=50, deadline=None)
@given(
    limits=st.builds(
        lambda blocks, seqs, budget, lag: Limits(blocks, 4, seqs, budget, 56, prefix_caching=False, lag=lag),
        st.sampled_from([14, 20, 28]),
        st.sampled_from([1, 2, 5]),
        st.sampled_from([5, 8]),
        st.sampled_from([0, 1]),
    ),
    shapes=st.lists(st.tuples(st.sampled_from([1, 10, 30, 40]), st.integers(1, 16)), min_size=2, max_size=6),
    queue=st.sampled_from(["plas,quantum_ms=0.003", "atlas,quantum_ms=0.001,factor=1,levels=1000"]),
    beta=st.sampled_from([0, 0.1, 1, 5]),
)
def test_nobody_stops_others_for_ever(
    mode: str, limits: Limits, shapes: list[tuple[int, int]], queue: str, beta: float
) -> None:
    """Quanta shorter than a prefill, promotions after the shortest wait, little memory: all end before long."""
    jobs = [Job(prompt, output, i, program=i % 3) for i, (prompt, output) in enumerate(shapes)]
    drive = Drive(limits, StackSpec(f"preemptive,mode={mode}", f"{queue},beta={beta}"), jobs, max_plans=2_000)
    assert all(request.state is State.LENGTH for request in drive.requests)
    assert not [step.refused for step in drive.steps if step.refused]


def test_two_that_are_one_token_short_of_their_first_do_not_stop_each_other_for_ever() -> None:
    """A prompt of which chunks of 5 leave one token has as much to compute as a decode, and nothing to show."""
    limits = Limits(28, 4, 1, 5, 112, lag=1)
    queue = "atlas,quantum_ms=0.002,factor=1,levels=1000,beta=0.1"
    drive = Drive(limits, StackSpec("preemptive", queue), [Job(10, 10), Job(40, 10)], max_plans=300)
    assert all(request.state is State.LENGTH for request in drive.requests)


def test_two_that_are_promoted_in_turn_without_memory_for_both_do_not_take_it_from_each_other_for_ever() -> None:
    shapes = [(30, 15), (30, 4), (30, 16), (1, 9), (30, 18)]
    for arrivals in permutations(range(5)):
        jobs = [Job(prompt, output, at, program=None) for (prompt, output), at in zip(shapes, arrivals, strict=True)]
        limits = Limits(16, 4, 5, 8, 64, prefix_caching=False)
        stack = StackSpec("preemptive", "plas,quantum_ms=0.003,beta=0.1", "watermark,watermark=0")
        drive = Drive(limits, stack, jobs, max_plans=2_000, check=False)
        assert all(request.state is State.LENGTH for request in drive.requests)


@pytest.mark.parametrize(
    "knobs",
    ["quantum_ms=0", "factor=0.5", "beta=-1", "levels=0", "levels=100", "remember=0"],
)
@pytest.mark.parametrize("name", ["plas", "atlas"])
def test_knobs_that_make_no_sense_are_refused(name: str, knobs: str) -> None:
    with pytest.raises(PolicyError):
        registry.make("queue", f"{name},{knobs}")


def test_alarms_come_in_order_and_once() -> None:
    alarms = Alarms()
    requests = [Request(i, 0, 1, 1) for i in range(4)]
    for request, time in zip(requests, (30, 10, 20, 10), strict=True):
        alarms.set(request, time)
    alarms.set(requests[0], 5)
    alarms.cancel(requests[2])
    assert [r.id for r in alarms.due(4)] == []
    assert [r.id for r in alarms.due(10)] == [0, 1, 3]
    assert [r.id for r in alarms.due(100)] == []
    for i in range(1000):
        alarms.set(requests[0], i)
    assert len(alarms._heap) <= 70


def test_atlas_takes_the_longest_of_several_parents_that_it_knows() -> None:
    queue = Atlas(quantum_ms=0.001)
    for i, served in enumerate((3_000, 8_000)):
        end(queue, waiting(queue, i, 5), served, 0)
    assert queue._call(waiting(queue, 10, 5, parents=(0, 1))).start == 11_000  # the second came after the first
    assert queue._call(waiting(queue, 11, 5, parents=(0,))).start == 3_000
    assert queue._call(waiting(queue, 12, 5, parents=(0, 77))).start == 3_000
    assert queue._call(waiting(queue, 13, 5, parents=(77,))).start == 11_000
