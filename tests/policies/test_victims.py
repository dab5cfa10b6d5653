"""Whom to preempt: each rule against its order written down plainly, over running requests of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import registry
from policies.contract import View
from policies.control_plane import ControlPlane
from policies.costing import prefill_ns
from policies.draft import Draft
from policies.plan import FOREVER, Mode, Plan, Report
from policies.prefix import block_keys
from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import PolicyStack, StackSpec
from tests.policies.byhand import ByHand
from tests.policies.harness import Drive, Job, LinearCost

SIZE = 4


@dataclass(frozen=True)
class Runner:
    """A request that is brought to run: so many output tokens behind it, by its place in the order of admission."""

    prompt: int
    output: int
    declared: int
    priority: int
    slo: Slo | None
    shared: bool
    part: int = 10  # tenths of the prompt that are computed; all, and the output tokens, or there is no output yet


SLOS = st.one_of(
    st.none(),
    st.builds(
        Slo,
        st.one_of(st.none(), st.integers(1, 500)),
        st.one_of(st.none(), st.integers(1, 50)),
        st.one_of(st.none(), st.integers(1, 900)),
    ),
)
RUNNERS = st.lists(
    st.builds(
        Runner,
        st.integers(1, 30),
        st.integers(1, 12),
        st.integers(1, 40),
        st.integers(-1, 1),
        SLOS,
        st.booleans(),
        st.sampled_from([10, 10, 7, 3]),
    ),
    min_size=1,
    max_size=7,
)


class Replica:
    """Requests that run, admitted in the order of the list, though they have arrived in another."""

    def __init__(self, runners: list[Runner], arrivals: list[int]) -> None:
        self.scheduler = ByHand()
        parts = StackSpec().build(block_size=SIZE)
        stack = PolicyStack(self.scheduler, parts.admission, parts.preemption, parts.eviction)
        self.plane = ControlPlane(Limits(400, SIZE, 10, 4000, 200), stack, cost=LinearCost(), check=True)
        self.requests: list[Request] = []
        self.now = 0
        for i, (runner, arrival) in enumerate(zip(runners, arrivals, strict=True)):
            tokens = [7] * runner.prompt if runner.shared else [100 + i] * runner.prompt
            request = Request(
                i, arrival, runner.prompt, 60, priority=runner.priority, slo=runner.slo,
                hints={"output_tokens": float(runner.declared)},
            )  # fmt: skip
            self.plane.submit(request, self.now, block_keys(tokens, SIZE))
            hit = self.plane.view.probe(request).num_tokens
            tokens = max(1, (runner.prompt - hit) * runner.part // 10)
            self._step(Plan(chunks=[(request, tokens)]))
            for _ in range(runner.output - 1 if tokens == runner.prompt - hit else 0):
                self._step(Plan(decodes=[request]))
            self.requests.append(request)

    def _step(self, plan: Plan) -> None:
        self.scheduler.answer = lambda view, now: plan
        step = self.plane.plan(self.now)
        assert not step.refused
        self.now += 10
        self.plane.report(Report(step, self.now - 10, self.now, 10))


def freed(view: View, request: Request, gone: list[Request]) -> int:
    """Blocks that nobody else would hold then, counted block by block."""
    others = {block for r in view.running.values() if r is not request and r not in gone for block in r._blocks}
    return len(set(request._blocks) - others)


Key = Callable[[Request, View, list[Request]], object]


def due(request: Request) -> float:
    """The time of a request's next objective, case by case."""
    slo = request.slo
    if slo is None:
        return FOREVER
    if request.first_token_ns is None and slo.ttft_ns is not None:
        return request.arrival_ns + slo.ttft_ns
    if slo.e2e_ns is not None:
        return request.arrival_ns + slo.e2e_ns
    if request.first_token_ns is None:
        return FOREVER
    return FOREVER if slo.tpot_ns is None else request.first_token_ns + slo.tpot_ns * request.num_output_tokens


def cost_a_block(request: Request, view: View, gone: list[Request]) -> tuple[bool, float]:
    blocks = freed(view, request, gone)
    return (blocks > 0, -prefill_ns(LinearCost(), request.num_tokens) / blocks if blocks else 0.0)


WORST: dict[str, Key] = {
    "last_admitted": lambda r, view, gone: list(view.running).index(r.id),
    "last_arrived": lambda r, view, gone: r.arrival_ns,
    "longest": lambda r, view, gone: r.num_computed_tokens,
    "fewest_output": lambda r, view, gone: (-r.num_output_tokens, r.num_prompt_tokens),
    "least_progress": lambda r, view, gone: -r.num_output_tokens / r.hints["output_tokens"],
    "lowest_priority": lambda r, view, gone: r.priority,
    "most_slack": lambda r, view, gone: due(r),
    "most_blocks": lambda r, view, gone: freed(view, r, gone),
    "cheapest": cost_a_block,
}


SPARES_ELDEST = {"longest", "most_blocks", "cheapest"}
"""Who was admitted first of those left goes last under these."""


def test_every_registered_rule_is_tested_here() -> None:
    assert sorted(WORST) == registry.names("preemption")


@pytest.mark.parametrize("name", WORST)
@settings(max_examples=40, deadline=None)
@given(RUNNERS, st.data())
def test_victims_come_in_the_order_of_the_rule_until_nobody_is_left(
    name: str, runners: list[Runner], data: st.DataObject
) -> None:
    replica = Replica(runners, data.draw(st.permutations(range(len(runners))), label="arrivals"))
    policy, view = registry.make("preemption", name), replica.plane.view
    draft, gone = view.draft(), []
    for _ in runners:
        left = [r for r in view.running.values() if r not in gone]
        if name in SPARES_ELDEST and len(left) > 1:
            left = left[1:]
        worst = max(left, key=lambda r: (WORST[name](r, view, gone), *r.key))
        before = draft.blocks_left
        found = policy.victim(view, draft, replica.now)
        assert found == (worst, Mode.RECOMPUTE)
        draft.preempt(*found)
        assert draft.blocks_left - before == freed(view, worst, gone)
        gone.append(worst)
    assert policy.victim(view, draft, replica.now) is None


@pytest.mark.parametrize("name", sorted(set(WORST) - {"last_admitted"}))
@settings(max_examples=15, deadline=None)
@given(RUNNERS, st.data())
def test_the_next_victim_is_the_worst_of_those_left_whoever_else_the_draft_or_a_copy_of_it_has_stopped(
    name: str, runners: list[Runner], data: st.DataObject
) -> None:
    replica = Replica(runners, list(range(len(runners))))
    policy, view = registry.make("preemption", name), replica.plane.view
    drafts = [(view.draft(), list[Request]())]
    for _ in runners:
        draft, gone = data.draw(st.sampled_from(drafts), label="draft")
        left = [r for r in view.running.values() if r not in gone]
        if not left:
            continue
        if data.draw(st.booleans(), label="by the rule"):
            spared = left[1:] if name in SPARES_ELDEST and len(left) > 1 else left
            worst = max(spared, key=lambda r: (WORST[name](r, view, gone), *r.key))
            found = policy.victim(view, draft, replica.now)
            assert found == (worst, Mode.RECOMPUTE)
            left = [worst]
        if data.draw(st.booleans(), label="in a copy"):
            draft, gone = draft.copy(), gone[:]
            drafts.append((draft, gone))
        stopped = data.draw(st.sampled_from(left), label="stopped")
        draft.preempt(stopped, Mode.RECOMPUTE)
        gone.append(stopped)


def test_ranks_are_looked_at_anew_in_every_plan() -> None:
    replica = Replica([Runner(prompt, 1, 9, 0, None, False) for prompt in (4, 10, 9)], [0, 1, 2])
    policy, view = registry.make("preemption", "longest"), replica.plane.view
    _, second, third = replica.requests
    assert policy.victim(view, view.draft(), replica.now) == (second, Mode.RECOMPUTE)
    for _ in range(2):
        replica._step(Plan(decodes=[third]))
    assert policy.victim(view, view.draft(), replica.now) == (third, Mode.RECOMPUTE)


def test_of_two_that_free_as_much_the_one_that_is_computed_again_sooner_is_the_cheapest() -> None:
    """And a shared prefix makes a long request free little: `longest` and `most_blocks` part ways."""
    runners = [
        Runner(24, 1, 9, 0, None, True),
        Runner(28, 1, 9, 0, None, True),
        Runner(13, 1, 9, 0, None, False),
        Runner(16, 1, 9, 0, None, False),
    ]
    replica = Replica(runners, [0, 1, 2, 3])
    view = replica.plane.view
    chosen = {}
    for name in ("longest", "most_blocks", "cheapest"):
        victim = registry.make("preemption", name).victim(view, view.draft(), replica.now)
        assert victim is not None
        chosen[name] = victim[0].id
    assert [freed(view, request, []) for request in replica.requests] == [0, 1, 4, 4]
    assert chosen == {"longest": 1, "most_blocks": 3, "cheapest": 2}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", WORST)
def test_whoever_is_chosen_everybody_ends_and_the_rule_has_decided(name: str, lag: int) -> None:
    """Six that grow to 15 blocks each in 30: none of the rules can keep them from ending."""
    work = [Job(20, 40, priority=i % 3) for i in range(6)]
    drive = Drive(Limits(30, 4, 6, 32, 110, prefix_caching=False, lag=lag), StackSpec(preemption=name), work)
    assert all(request.state.value == "length" for request in drive.requests)
    assert sum(request.num_preemptions for request in drive.requests) > 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", WORST)
def test_prompts_in_chunks_that_do_not_fit_together_do_not_take_memory_from_each_other_for_ever(
    name: str, lag: int
) -> None:
    """Each in its turn is the longest, the one that frees the most, the cheapest."""
    for prompts, chunk in (([40, 40], 4), ([40, 39, 41], 1), ([40, 39, 41], 3)):
        work = [Job(prompt, 5, priority=-i) for i, prompt in enumerate(prompts)]
        limits = Limits(14, 4, 3, 12, 56, prefix_caching=False, lag=lag)
        stack = StackSpec(f"mixed,long_prefill_threshold={chunk}", "fcfs", "watermark,watermark=0", name)
        drive = Drive(limits, stack, work, max_plans=800)
        assert all(request.state.value == "length" for request in drive.requests)


def test_the_cheapest_needs_a_cost_model() -> None:
    with pytest.raises(ValueError, match="Cheapest plans by what steps cost"):
        ControlPlane(Limits(30), StackSpec(preemption="cheapest").build())


def test_a_draft_says_what_preempting_would_free_beside_what_it_frees_already() -> None:
    shared = [Runner(25, 1, 9, 0, None, True), Runner(25, 1, 9, 0, None, True)]
    replica = Replica(shared, [0, 1])
    draft: Draft = replica.plane.view.draft()
    first, second = replica.requests
    assert (draft.blocks_freed_by(first), draft.blocks_freed_by(second)) == (1, 1)
    draft.preempt(first, Mode.RECOMPUTE)
    assert draft.blocks_freed_by(second) == 7
