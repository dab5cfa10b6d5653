"""Continuum: how long blocks are kept for a tool, who finds them again, and that nobody is kept from running."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import Hit
from policies.plan import FOREVER, Plan, Report, Step
from policies.prefix import block_keys
from policies.records import DECISIONS, REQUESTS
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.schedulers.continuum import Continuum, Durations, Turns
from policies.stack import StackSpec
from tests.policies.decisions import decisions, outcomes
from tests.policies.harness import STEP_NS, LinearCost
from tests.policies.programs import Call, ProgramDrive

LONG = "continuum,default_ttl_ms=1000"
"""A second is a million steps."""


def durations(*values: int, window: int = 1000) -> Durations:
    made = Durations(window)
    for value in values:
        made.add(value)
    return made


# How long


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 200))
def test_tau_is_the_best_of_all_observed_durations(values: list[int], gain: int) -> None:
    def worth(tau: int) -> Fraction:
        return Fraction(sum(value <= tau for value in values), len(values)) * gain - tau

    tau = durations(*values).ttl(gain)
    best = max(worth(value) for value in values)
    assert worth(tau) == max(best, Fraction(0)) or (tau == 0 and best <= 0)
    assert tau == 0 or tau in values


def test_of_a_tool_with_a_short_and_a_long_mode_only_the_short_one_is_waited_for() -> None:
    tool = durations(*[10] * 60, *[1000] * 40)
    assert tool.ttl(100) == 10  # 0.6 * 100 - 10 = 50, and 1 * 100 - 1000 = -900
    assert tool.ttl(2400) == 10  # 1430 and 1400
    assert tool.ttl(2600) == 1000  # 1550 and 1600
    assert tool.ttl(16) == 0  # 0.6 * 16 < 10


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_only_the_last_durations_count(values: list[int]) -> None:
    made = durations(*values, window=7)
    assert made._sorted == sorted(values[-7:])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_eta_is_the_correlation_of_calls_done_and_calls_left(lengths: list[int]) -> None:
    turns = Turns()
    for length in lengths:
        turns.add(length)
    done = np.array([k for n in lengths for k in range(1, n + 1)], float)
    left = np.array([n - k for n in lengths for k in range(1, n + 1)], float)
    if done.std() == 0 or left.std() == 0:
        assert turns.eta() == 1
    else:
        assert turns.eta() == pytest.approx(max(0.0, -np.corrcoef(done, left)[0, 1]), abs=1e-9)


def test_if_all_programs_are_equally_long_eta_is_one_and_falls_as_they_differ() -> None:
    alike, unlike = Turns(), Turns()
    assert alike.eta() == 1
    for _ in range(5):
        alike.add(6)
        unlike.add(2)
        unlike.add(20)
    assert alike.eta() == pytest.approx(1)
    assert unlike.eta() == pytest.approx(0.6376, abs=1e-4)


def scheduler(**knobs: float) -> Continuum:
    text = ",".join(["continuum", *(f"{name}={value}" for name, value in knobs.items())])
    made = registry.make("scheduler", text)
    assert isinstance(made, Continuum)
    made._cost = LinearCost()
    return made


def call(request_id: int, program: int | None, arrival: int = 0, tool: float | None = 1.0, prompt: int = 40) -> Request:
    return Request(request_id, arrival, prompt, 10, program=program, hints={} if tool is None else {"tool": tool})


def end(policy: Continuum, request: Request, now: int) -> None:
    request.state, request.finish_ns = State.STOPPED, now
    policy._order.remove(request)
    policy.on_report(Report(Step(0, 0), now - 1, now, 1, [(request, State.STOPPED, 1)]))


def test_the_default_holds_until_a_tool_has_enough_records() -> None:
    policy, now = scheduler(min_records=4, default_ttl_ms=5), 0
    for i in range(5):
        request = call(i, 3, now)
        policy.add(request, now)
        assert policy.ttl(request) == (5_000_000 if i < 4 else 30)
        assert policy.ttl(call(99, 3, tool=2.0)) == 5_000_000
        end(policy, request, now + 100)
        now += 130  # the tool takes 30


def test_a_ttl_weighs_the_wait_of_those_that_were_evicted_and_the_prefill() -> None:
    policy = scheduler(min_records=1)
    policy._tools[1.0] = durations(400, 5_000)
    context = call(0, 1, prompt=40)
    reload = 200 + 20 * 40 + 40 * 41 // 2 // 8  # = 1102, as LinearCost says
    assert policy.ttl(context) == 400  # 0.5 * 1102 - 400 > 0
    policy._delays.extend([10_000, 8_000])
    assert policy.ttl(context) == 5_000  # T = 9000: 0.5 * 10102 - 400 = 4651, 10102 - 5000 = 5102
    policy._turns.add(2)
    policy._turns.add(20)
    gain = 9_000 * policy._turns.eta() + reload
    assert 0.5 * gain - 400 > gain - 5_000
    assert policy.ttl(context) == 400


# Whose turn it is


def test_preempted_calls_go_first_then_pinned_ones_then_by_arrival_of_the_program() -> None:
    policy = scheduler()
    first = call(0, 7, arrival=0)
    policy.add(first, 0)
    first._blocks = [5]
    end(policy, first, 10)
    for request in (call(1, 5, 20), call(2, 6, 21), call(3, 7, 30), call(4, 5, 40), call(5, None, 25)):
        policy.add(request, request.arrival_ns)
    preempted = call(6, 9, 50)
    preempted.num_preemptions = 1
    policy.add(preempted, 50)
    assert [policy._order.pop(60).id for _ in range(6)] == [6, 3, 1, 4, 2, 5]


# Who finds its blocks

PRESSED = Limits(16, 4, 4, 64, 60)


def agent(
    program: int, turns: int, gap: int, start: int, *, arrives: int = 0, prompt: int = 12, output: int = 4
) -> list[Call]:
    """Each turn's prompt is all that was said before, and 4 tokens of a tool's answer."""
    tokens: list[int] = [1000 * program + i for i in range(prompt)]
    made = []
    for turn in range(turns):
        whole = [*tokens, *(100_000 * (program + 1) + 100 * turn + i for i in range(output))]
        hints = {"tool": 1.0} if turn < turns - 1 else {}
        after = (start + turn - 1,) if turn else ()
        keys = tuple(block_keys(whole, 4))
        made.append(Call(len(tokens), output, arrives, keys=keys, program=program, hints=hints, after=after, gap=gap))
        tokens = [*whole, *(7_000_000 + 100 * turn + i for i in range(4))]
    return made


def pressure(count: int) -> list[Call]:
    """Others, one after the other, each of which takes most of the memory that an agent leaves."""
    return [
        Call(24, 6, arrives=3 * i, keys=tuple(block_keys([90_000 + 100 * i + j for j in range(30)], 4)))
        for i in range(count)
    ]


def cached(drive: ProgramDrive, i: int) -> int:
    return drive.requests[i].num_cached_tokens


def test_a_call_that_returns_within_the_ttl_finds_the_blocks_that_it_loses_without() -> None:
    calls = [*agent(0, 3, gap=12, start=0), *pressure(12)]
    pinned, plain = (ProgramDrive(PRESSED, StackSpec(name), calls) for name in (LONG, "mixed"))
    assert (cached(plain, 1), cached(plain, 2)) == (0, 0)
    assert cached(pinned, 1) == 12  # of 20: the 12 tokens of the first prompt, and its output but the last token
    assert cached(pinned, 2) == 20
    assert all(request.state is State.LENGTH for request in pinned.requests)


@pytest.mark.parametrize(("ttl_steps", "kept"), [(4, False), (13, True)])
def test_a_call_that_returns_too_late_does_not(ttl_steps: int, kept: bool) -> None:
    calls = [*agent(0, 2, gap=12, start=0), *pressure(12)]
    drive = ProgramDrive(PRESSED, StackSpec(f"continuum,default_ttl_ms={ttl_steps * STEP_NS / 1e6}"), calls)
    assert (cached(drive, 1) > 0) is kept


def pins(drive: ProgramDrive) -> list[tuple[int, int, int]]:
    """(time, request, until) of every pin planned."""
    return [(now, request.id, until) for now, plan in drive.plans for request, until in plan.pin]  # type: ignore[attr-defined]


class Watched(ProgramDrive):
    """Keeps what was planned. Whoever runs alone is not preempted as long as there is a pin to lift."""

    def _run(self, max_plans: int) -> None:
        policy, self.plans = self.stack.scheduler, []
        plan_by_rule = policy.plan

        def plan(view: object, now: int) -> Plan:
            made = plan_by_rule(view, now)  # type: ignore[arg-type]
            self.plans.append((now, made))
            if made.preempt and self.plane.num_running == 1:
                assert not [pin for pin in policy._pins.values() if pin.request.num_blocks]  # type: ignore[attr-defined]
            return made

        policy.plan = plan  # type: ignore[method-assign]
        super()._run(max_plans)

    plans: list[tuple[int, Plan]]


def test_a_pin_stands_from_admission_to_the_end_of_its_ttl() -> None:
    calls = [*agent(0, 2, gap=90, start=0), Call(2, 50, 0)]
    drive = Watched(Limits(64, 4, 4, 64, 60), StackSpec("continuum,default_ttl_ms=0.0305"), calls)
    # The call runs in steps 0 to 3 and ends at 4,000; the step that first ends at or after 34,500 ends at 35,000.
    assert pins(drive) == [(0, 0, FOREVER), (4_000, 0, 34_500), (35_000, 0, 35_000)]


def test_a_pin_is_not_lifted_while_the_next_call_waits_and_is_once_that_runs() -> None:
    calls = [*agent(0, 2, gap=5, start=0), Call(2, 40, 0)]
    limits = Limits(64, 4, 1, 64, 60)  # one slot: the next call waits for the other request's 40 steps
    drive = Watched(limits, StackSpec("continuum,default_ttl_ms=0.01"), calls)
    assert pins(drive) == [(0, 0, FOREVER), (4_000, 0, 14_000), (9_000, 0, FOREVER), (45_000, 0, 45_000)]
    assert cached(drive, 1) == 12


def test_a_pin_whose_next_call_is_cancelled_is_lifted() -> None:
    calls = [*agent(0, 2, gap=5, start=0), Call(2, 40, 0)]
    calls[1].cancel = 20
    drive = Watched(Limits(64, 4, 1, 64, 60), StackSpec("continuum,default_ttl_ms=0.01"), calls)
    assert pins(drive)[2:] == [(9_000, 0, FOREVER), (20_000, 0, 20_000)]


def test_the_wait_of_a_call_that_came_back_to_no_pin_is_remembered() -> None:
    calls = [*agent(0, 2, gap=5, start=0), Call(2, 40, 0)]
    limits = Limits(64, 4, 1, 64, 60)
    late = ProgramDrive(limits, StackSpec("continuum,default_ttl_ms=0"), calls)
    assert list(late.stack.scheduler._delays) == [35_000]  # type: ignore[attr-defined]
    kept = ProgramDrive(limits, StackSpec("continuum,default_ttl_ms=0.01"), calls)
    assert list(kept.stack.scheduler._delays) == []  # type: ignore[attr-defined]
    assert list(kept.stack.scheduler._tools[1.0]._recent) == [5_000]  # type: ignore[attr-defined]


def test_memory_that_pins_take_is_given_to_who_could_not_run_else() -> None:
    """Four agents leave all of memory pinned for ever, and a request needs nearly all of it."""
    calls = [c for p in range(4) for c in agent(p, 2, gap=900, start=2 * p)]
    calls.append(Call(40, 10, 4))
    drive = Watched(PRESSED, StackSpec(LONG), calls, max_plans=5_000)
    assert drive.requests[8].first_scheduled_ns is not None
    assert drive.requests[8].first_scheduled_ns < 30 * STEP_NS
    assert cached(drive, 1) > 0  # of the program that came first, as less was enough
    assert cached(drive, 7) == 0


# At its limits


@st.composite
def agents(draw: st.DrawFn) -> list[Call]:
    """Programs with tools, with calls side by side, cancelled ones, and requests of no program."""
    made: list[Call] = []
    for program in range(draw(st.integers(1, 5))):
        prompt, output = draw(st.integers(1, 20)), draw(st.integers(1, 8))
        turns, gap, arrives = draw(st.integers(1, 4)), draw(st.integers(0, 30)), draw(st.integers(0, 20))
        chain = agent(program, turns, gap, len(made), arrives=arrives, prompt=prompt, output=output)
        for one in chain:
            one.cancel = draw(st.sampled_from([None, None, None, 4, 12]))
            one.hints = draw(st.sampled_from([one.hints, one.hints, one.hints, {"tool": 2.0}]))
        made += chain
        if draw(st.booleans()):
            made.append(Call(prompt, output, arrives, program=program, hints={"tool": 1.0}))
    for i in range(draw(st.integers(0, 4))):
        made.append(Call(draw(st.integers(1, 40)), draw(st.integers(1, 15)), 5 * i))
    return made


MEMORY = st.builds(
    lambda blocks, seqs, budget, caching, lag: Limits(blocks, 4, seqs, budget, 64, prefix_caching=caching, lag=lag),
    st.sampled_from([16, 20, 40]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([8, 40]),
    st.booleans(),
    st.sampled_from([0, 1]),
)
KNOBS = st.sampled_from(["default_ttl_ms=1000", "default_ttl_ms=0.01", "default_ttl_ms=1000,min_records=1"])


@settings(max_examples=75, deadline=None)
@given(MEMORY, agents(), KNOBS, st.sampled_from(["full_prompt", "watermark,watermark=0.1", "reserve_max"]))
def test_pins_keep_nobody_from_running(limits: Limits, calls: list[Call], knobs: str, admission: str) -> None:
    """Everybody ends, nothing is refused, and what is held is known."""
    drive = Watched(limits, StackSpec(f"continuum,{knobs}", admission=admission), calls)
    rows = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests}
    for i, one in enumerate(calls):
        if rows[i]["status"] in ("stop", "length"):
            assert rows[i]["output_tokens"] == one.output
        else:
            assert rows[i]["status"] == "refused" or one.cancel is not None
    assert not [row for row in drive.log.decisions if dict(zip(DECISIONS, row, strict=True))["kind"] == "refused"]
    policy = drive.stack.scheduler
    assert isinstance(policy, Continuum)
    held = {request.id for request in drive.requests if request.num_blocks}
    known = {pin.request.id for pin in policy._pins.values()} | policy._untold.keys()
    assert held <= known, "memory is held that nobody will give back"
    assert not policy._unpinned
    assert not policy._order._waiting


@settings(max_examples=20, deadline=None)
@given(agents(), st.sampled_from([0, 1]), st.sampled_from([3, 50]))
def test_with_memory_and_slots_for_all_it_runs_as_mixed_does(calls: list[Call], lag: int, budget: int) -> None:
    limits = Limits(600, 4, 50, budget, 64, lag=lag)
    for one in calls:
        one.program = None
    pinned, plain = (ProgramDrive(limits, StackSpec(name), calls) for name in (LONG, "mixed"))
    assert decisions(pinned) == decisions(plain)
    assert outcomes(pinned) == outcomes(plain)


def test_programs_and_tools_are_remembered_as_many_as_allowed() -> None:
    policy = scheduler(remember=3)
    for i in range(20):
        for turn in range(2):
            request = call(2 * i + turn, i, 100 * i + 10 * turn, tool=float(i))
            policy.add(request, request.arrival_ns)
            end(policy, request, request.arrival_ns + 5)
    assert list(policy._programs) == [17, 18, 19]
    assert list(policy._tools) == [17.0, 18.0, 19.0]


def test_a_program_whose_last_call_names_no_tool_is_forgotten_and_counted() -> None:
    policy = scheduler()
    for i in range(3):
        request = call(i, 4, 100 * i, tool=None if i == 2 else 1.0)
        policy.add(request, request.arrival_ns)
        end(policy, request, request.arrival_ns + 5)
    assert not policy._programs
    assert policy._turns._n == 3


def test_a_call_stopped_by_its_text_is_followed_by_its_tool_like_any_other() -> None:
    policy, stopped, cancelled = scheduler(), call(0, 4), call(1, 5)
    for request, state in ((stopped, State.STOPPED), (cancelled, State.CANCELLED)):
        policy.add(request, 0)
        request._blocks = [request.id]
        request.state = state
        policy.remove(request, 50)
    assert list(policy._pins) == [4]
    assert list(policy._untold) == [0, 1]


@pytest.mark.parametrize(
    "knobs", ["default_ttl_ms=-1", "min_records=0", "min_records=2000", "window=20000", "remember=0"]
)
def test_knobs_that_make_no_sense_are_refused(knobs: str) -> None:
    with pytest.raises(PolicyError):
        registry.make("scheduler", f"continuum,{knobs}")


def test_it_is_refused_where_no_cost_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StackSpec(LONG).build().needs_cost() is not None


class Full:
    """A replica, and a plan for it, that have no block left; each pin lifted frees one."""

    running: dict[int, Request] = {}  # noqa: RUF012
    prefilling: dict[int, Request] = {}  # noqa: RUF012
    block_size = 4

    def __init__(self) -> None:
        self.blocks_left = 0
        self.lifted: list[int | None] = []

    def decodes_that_need_a_block(self) -> list[Request]:
        return []

    def probe(self, request: Request) -> Hit:
        return Hit()

    def lift_pin(self, request: Request, now: int) -> None:
        self.lifted.append(request.program)
        self.blocks_left += 1


@pytest.mark.parametrize("blocks", range(1, 5))
def test_pins_that_nobody_waits_for_are_lifted_first_then_those_of_the_programs_that_came_last(blocks: int) -> None:
    policy, full = scheduler(), Full()
    for program, arrival, returns in ((1, 0, False), (2, 5, False), (3, 9, True), (4, 1, True)):
        first = call(program, program, arrival)
        policy.add(first, arrival)
        first._blocks = [program]
        end(policy, first, 20)
        if returns:
            policy.add(call(10 + program, program, 30), 30)
    head = call(99, 50, 40, prompt=4 * blocks)
    head.num_preemptions = 1
    policy.add(head, 40)
    policy.add(call(98, 51, 8), 40)
    policy._end_deadlock(full, full, 50)  # type: ignore[arg-type]
    assert full.lifted == [2, 1, 3, 4][:blocks]
    assert policy._unpinned == set([13, 14][: max(0, blocks - 2)])
    order = {1: [99, 14, 13, 98], 2: [99, 14, 13, 98], 3: [99, 14, 98, 13], 4: [99, 14, 98, 13]}
    assert [policy._order.pop(60).id for _ in range(4)] == order[blocks]


@pytest.mark.parametrize(
    "stack",
    [
        StackSpec("continuum,default_ttl_ms=1000"),
        StackSpec("preemptive", "plas,quantum_ms=0.003,beta=2"),
        StackSpec("preemptive,mode=keep", "atlas,quantum_ms=0.003,beta=2"),
    ],
    ids=lambda stack: stack.queue if "preemptive" in stack.scheduler else stack.scheduler,
)
@settings(max_examples=20, deadline=None)
@given(limits=MEMORY, calls=agents(), steps=st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
def test_it_may_be_put_in_place_and_replaced_while_calls_run(
    stack: StackSpec, limits: Limits, calls: list[Call], steps: list[int]
) -> None:
    class Swapping(ProgramDrive):
        def _deliver(self, now: int) -> None:
            if steps and self.plane.next_step >= min(steps):
                steps.remove(min(steps))
                spec = stack if len(steps) % 2 == 0 else StackSpec()
                made = spec.build(block_size=limits.block_size)
                self.plane.change_policies({"scheduler": made.scheduler}, {"scheduler": spec.scheduler}, now)
            super()._deliver(now)

    steps = list(steps)
    drive = Swapping(limits, StackSpec(), calls)
    for request, one in zip(drive.requests, calls, strict=True):
        assert request.state in (State.LENGTH, State.REFUSED) or one.cancel is not None
    assert not [row for row in drive.log.decisions if dict(zip(DECISIONS, row, strict=True))["kind"] == "refused"]
