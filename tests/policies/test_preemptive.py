"""Preemption by the queue's order: who is stopped for whom, and that everybody ends whatever the order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Queue, View
from policies.draft import Draft
from policies.plan import Mode, Plan, Report
from policies.prefix import block_keys
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, State
from policies.schedulers.preemptive import Line, Preemptive
from policies.stack import StackSpec
from tests.policies.decisions import decisions
from tests.policies.harness import STEP_NS, Drive, Job, LinearCost
from tests.policies.test_live_change import Operated, _change

HERE = "tests.policies.test_preemptive:"


class Fickle:
    """An order that is drawn anew every so many plans: as much as a queue can do to make requests stop each other."""

    def __init__(self, every: int = 1, salt: int = 0) -> None:
        self._every, self._salt = every, salt
        self._plans = 0
        self._waiting: dict[int, Request] = {}

    def order(self, request: Request) -> tuple[float, int, int]:
        drawn = random.Random(f"{self._salt} {self._plans // self._every} {request.key}").random()
        return (drawn, *request.key)

    def preemptible(self, request: Request) -> bool:
        return True

    def push(self, request: Request, now: int) -> None:
        self._waiting[request.id] = request

    def peek(self, now: int) -> Request | None:
        return min(self._waiting.values(), key=self.order, default=None)

    def pop(self, now: int) -> Request:
        head = self.peek(now)
        assert head is not None
        return self._waiting.pop(head.id)

    def remove(self, request: Request) -> None:
        self._waiting.pop(request.id, None)

    def begin(self, draft: Draft, now: int) -> None:
        self._plans += 1

    def on_report(self, report: Report) -> None:
        """Nothing it goes by."""


class Watched(Preemptive):
    """Holds every plan to what the scheduler says of itself."""

    def __init__(self, queue: Queue, mode: str = "recompute", long_prefill_threshold: int = 0) -> None:
        super().__init__(queue, mode, long_prefill_threshold)
        self._had: dict[int, int] = {}  # request -> output tokens when it was started last

    def plan(self, view: View, now: int) -> Plan:
        plan = super().plan(view, now)
        started = [r for r, _ in plan.chunks if r.state is State.WAITING] + plan.resume
        named = [r.id for r in started] + [r.id for r, _ in plan.preempt]
        assert len(named) == len(set(named)), "somebody is named twice"
        for request in started:
            self._had[request.id] = request.num_output_tokens
        return plan

    def _admit(self, line: Line, draft: Draft, head: Request) -> Draft | None:
        before = [r for r, _ in draft.plan.preempt]
        started = super()._admit(line, draft, head)
        if started is None:
            assert [r for r, _ in draft.plan.preempt] == before, "stopped in vain"
        for request, _ in [] if started is None else started.plan.preempt:
            if request not in before:
                assert self._order.order(request) > self._order.order(head), "stopped for somebody behind it"
                got_token = request.state is State.PAUSED or request.num_output_tokens > self._had[request.id]
                assert got_token, "stopped before it got a token"
        return started


LIMITS = st.builds(
    lambda blocks, seqs, budget, caching, lag, host: Limits(
        blocks, 4, seqs, budget, 56, prefix_caching=caching, lag=lag, num_host_blocks=host
    ),
    st.sampled_from([14, 18, 28]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([5, 8, 30]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 3, 12, 60]),
)
SHAPES = st.lists(
    st.tuples(st.sampled_from([1, 9, 30, 40]), st.integers(1, 16), st.integers(0, 9)), min_size=2, max_size=7
)


def jobs(shapes: list[tuple[int, int, int]]) -> list[Job]:
    """Every other one with a prefix in common."""
    made = []
    for i, (prompt, output, arrives) in enumerate(shapes):
        tokens = [7 if i % 2 else i] * min(prompt, 16) + [100 + i] * (prompt - min(prompt, 16)) + [200 + i] * output
        made.append(Job(prompt, output, arrives, keys=tuple(block_keys(tokens, 4)), priority=i % 3))
    return made


@settings(max_examples=100, deadline=None)
@given(
    limits=LIMITS,
    shapes=SHAPES,
    mode=st.builds(
        "{},long_prefill_threshold={}".format,
        st.sampled_from(["recompute", "keep", "swap", "cheapest"]),
        st.sampled_from([0, 4]),
    ),
    queue=st.builds(f"{HERE}Fickle,every={{}},salt={{}}".format, st.sampled_from([1, 2, 7]), st.integers(0, 99)),
    admission=st.sampled_from(["watermark,watermark=0", "watermark,watermark=0.1", "reserve_max", "full_prompt"]),
)
def test_whatever_the_order_and_however_often_it_changes_everybody_ends(
    limits: Limits, shapes: list[tuple[int, int, int]], mode: str, queue: str, admission: str
) -> None:
    drive = Drive(limits, StackSpec(f"{HERE}Watched,mode={mode}", queue, admission), jobs(shapes), max_plans=3_000)
    assert all(request.state is State.LENGTH for request in drive.requests)
    assert not [step.refused for step in drive.steps if step.refused]
    assert drive.plane.view.num_free_host_blocks == limits.num_host_blocks


def stops(drive: Drive) -> list[tuple[int, list[tuple[int, str]], list[int]]]:
    """Of each step that stops somebody: its index, whom and how, and who is admitted or resumed."""
    return [
        (s.index, [(r.id, mode.value) for r, mode in s.preempted], [r.id for r in [*s.admitted, *s.resumed]])
        for s in drive.steps
        if s.preempted
    ]


def test_where_more_decode_than_there_are_tokens_the_first_in_the_order_do_and_nobody_is_stopped() -> None:
    """As where another scheduler has run before, that gives the tokens of a step to prompts alone."""
    work = [Job(2, 6, priority=i % 3) for i in range(12)]
    limits, before = Limits(60, 4, 12, 8, 64, prefix_caching=False), StackSpec("prefill_first", "priority")
    drive = Operated(limits, before, work, {3: _change(scheduler="preemptive", queue="priority")})
    made = decisions(drive)
    assert [len(decision.tokens) for decision in made[:3]] == [4, 4, 4]  # the prompts
    first = sorted(range(12), key=lambda i: (i % 3, i))[:8]
    for decision in made[3:8]:  # until they have their five more tokens
        assert decision.tokens == dict.fromkeys(first, 1)
    assert set(made[8].tokens) == set(range(12)) - set(first)
    assert stops(drive) == []
    assert all(request.state is State.LENGTH for request in drive.requests)


def test_nobody_is_stopped_for_a_slot_where_blocks_are_missing_all_the_same() -> None:
    work = [Job(60, 10), Job(4, 6, priority=1), Job(80, 2, arrives=2)]
    drive = Drive(Limits(30, 4, 2, 200, 110, prefix_caching=False), StackSpec("preemptive", "priority"), work)
    assert stops(drive) == []
    assert [r.finish_ns for r in drive.requests] == [10 * STEP_NS, 6 * STEP_NS, 12 * STEP_NS]


@pytest.mark.parametrize(("cap", "expected"), [(16, []), (12, [(2, [(1, "recompute")], [2])])])
def test_where_admission_says_no_it_is_asked_whether_stopping_others_would_help(cap: int, expected: list) -> None:
    """Of 30 blocks 26 and 3 are promised, and 5 or 4 wanted: without the second 4 can be had."""
    work = [Job(4, 100), Job(4, 8, priority=1), Job(4, cap, arrives=2)]
    stack = StackSpec("preemptive", "priority", "reserve_max")
    assert stops(Drive(Limits(30, 4, 6, 200, 110, prefix_caching=False), stack, work)) == expected


def test_who_is_paused_gives_up_its_blocks_where_a_slot_and_blocks_are_wanted() -> None:
    work = [Job(46, 9, priority=2), Job(46, 9, arrives=2, priority=1), Job(46, 2, arrives=4)]
    limits = Limits(30, 4, 1, 200, 110, prefix_caching=False)
    drive = Drive(limits, StackSpec("preemptive,mode=keep", "priority"), work)
    assert stops(drive) == [(2, [(0, "keep")], [1]), (4, [(1, "keep"), (0, "recompute")], [2])]


def test_who_was_to_keep_its_blocks_gives_them_up_if_they_are_wanted_too() -> None:
    work = [Job(100, 9, priority=2), Job(46, 2, arrives=2)]
    limits = Limits(30, 4, 1, 200, 110, prefix_caching=False)
    drive = Drive(limits, StackSpec("preemptive,mode=keep", "priority"), work)
    assert stops(drive) == [(2, [(0, "recompute")], [1])]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (40, [(2, [(0, "swap")], [1]), (4, [(1, "swap")], [2])]),
        (13, [(2, [(0, "swap")], [1]), (4, [(1, "recompute")], [2])]),
        (12, [(2, [(0, "recompute")], [1]), (4, [(1, "swap")], [2])]),
        (11, [(2, [(0, "recompute")], [1]), (4, [(1, "recompute")], [2])]),
        (0, [(2, [(0, "recompute")], [1]), (4, [(1, "recompute")], [2])]),
    ],
)
def test_who_is_stopped_goes_to_the_host_as_far_as_that_has_room_and_is_computed_again_else(
    host: int, expected: list
) -> None:
    """When stopped the first has computed 49 tokens, which take 13 blocks; the second 47, which take 12."""
    work = [Job(48, 9, priority=2), Job(46, 9, arrives=2, priority=1), Job(46, 2, arrives=4)]
    limits = Limits(30, 4, 1, 200, 110, prefix_caching=False, num_host_blocks=host)
    drive = Drive(limits, StackSpec("preemptive,mode=swap", "priority"), work)
    assert stops(drive) == expected
    swaps = sum(mode == "swap" for _, named, _ in expected for _, mode in named)
    assert sum(len(step.resumed) for step in drive.steps) == swaps
    computed = sum(c.num_tokens for step in drive.steps for c in step.chunks)
    again = sum({0: 50, 1: 48}[i] for _, named, _ in expected for i, mode in named if mode == "recompute")
    assert computed == 48 + 46 + 46 + again, "nothing is computed again of what was on the host"


@pytest.mark.parametrize("dearer", ["swap", "recompute"])
def test_the_cheapest_way_is_asked_of_the_cost_model_for_each_who_is_stopped(dearer: str) -> None:
    work = [Job(48, 9, priority=2), Job(46, 2, arrives=2)]

    class Drawn(Drive):
        def _run(self, max_plans: int) -> None:
            cost = LinearCost()
            price = 10**6 if dearer == "swap" else -1
            cost.step_ns = lambda shape: 10**6 + price * (shape.swapped_in > 0)  # type: ignore[method-assign]
            self.plane._state.cost = cost
            super()._run(max_plans)

    limits = Limits(30, 4, 1, 200, 110, prefix_caching=False, num_host_blocks=40)
    stack = StackSpec("preemptive,mode=cheapest", "priority")
    assert stack.build().needs_cost() == "Preemptive"
    assert stops(Drawn(limits, stack, work)) == [(2, [(0, {"swap": "recompute", "recompute": "swap"}[dearer])], [1])]
    assert StackSpec("preemptive,mode=swap", "priority").build().needs_cost() is None


def test_nobody_is_admitted_in_a_plan_in_which_a_prefill_took_memory() -> None:
    work = [Job(48, 30, priority=1), Job(40, 2, arrives=1), Job(4, 2, arrives=9)]
    limits = Limits(20, 4, 6, 100, 80, prefix_caching=False)
    drive = Drive(limits, StackSpec("preemptive,long_prefill_threshold=4", "priority"), work)
    stopping = next(step for step in drive.steps if step.preempted)
    assert [(r.id, mode) for r, mode in stopping.preempted] == [(0, Mode.RECOMPUTE)]
    assert ([c.request.id for c in stopping.chunks], stopping.admitted) == ([1], [])


def test_without_memory_the_last_in_the_order_is_stopped_whoever_was_admitted_last() -> None:
    work = [Job(40, 30, priority=1), Job(20, 30, arrives=1)]
    drive = Drive(Limits(20, 4, 6, 100, 80, prefix_caching=False), StackSpec("preemptive", "priority"), work)
    assert [r.num_preemptions for r in drive.requests] == [1, 0]


@pytest.mark.parametrize("knobs", ["mode=pause", "long_prefill_threshold=-1"])
def test_knobs_that_make_no_sense_are_refused(knobs: str) -> None:
    with pytest.raises(PolicyError, match="must be"):
        StackSpec(f"preemptive,{knobs}", "srpt").build()


def test_a_queue_that_does_not_order_running_requests_is_refused() -> None:
    with pytest.raises(PolicyError, match="orders running requests"):
        StackSpec("preemptive", "drr").build()
