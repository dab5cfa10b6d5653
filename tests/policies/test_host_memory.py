"""Preemption by swapping: blocks of both tiers are conserved, and what comes back is what went."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import View
from policies.costing import prefill_ns, swap_ns
from policies.host_pool import HostPool
from policies.plan import Mode, Plan, Step
from policies.prefix import block_keys
from policies.records import DECISIONS, STEPS
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.byhand import Desk, drawn
from tests.policies.harness import Drive, Job, LinearCost
from tests.policies.kv_model import KvModel
from tests.policies.test_live_change import Act, Operated, _change

LIMITS = Limits(12, 4, 5, 32, 40, prefix_caching=False, num_host_blocks=6)


def decoding(desk: Desk, *prompts: int) -> list[Request]:
    requests = [desk.submit(prompt) for prompt in prompts]
    desk.run(Plan(chunks=list(zip(requests, prompts, strict=True))))
    return requests


def test_a_swapped_request_gives_its_blocks_back_and_comes_back_with_all_it_computed() -> None:
    desk = Desk(LIMITS)
    first, other = decoding(desk, 9, 5)
    assert desk.plane.num_free_blocks == 12 - 3 - 2
    step = desk.run(Plan(preempt=[(first, Mode.SWAP)], decodes=[other]))
    assert (first.state, first.num_blocks, first.num_host_blocks) == (State.SWAPPED, 0, 3)
    assert (first.num_computed_tokens, first.num_preemptions) == (9, 1)
    (copy,) = step.copies
    assert (copy.request, copy.out, copy.device, copy.host) == (first, True, (0, 1, 2), (0, 1, 2))
    assert (step.shape.swapped_out, step.shape.swapped_in) == (12, 0)
    assert (desk.plane.num_free_blocks, desk.plane.view.num_free_host_blocks) == (10, 3)
    assert dict(desk.plane.view.swapped) == {first.id: first}
    assert desk.scheduler.queue == [first]
    assert (desk.plane.num_waiting, desk.plane.num_prefill_tokens) == (0, 1)

    step = desk.run(Plan(resume=[first], decode_all=True))
    assert step.resumed == [first]
    assert step.admitted == []
    (copy,) = step.copies
    assert (copy.out, copy.host, len(copy.device)) == (False, (0, 1, 2), 3)
    assert (step.shape.swapped_out, step.shape.swapped_in, step.num_decodes) == (0, 12, 2)
    assert list(desk.plane.block_table(first)) == list(copy.device)
    assert (first.num_computed_tokens, first.num_host_blocks, desk.plane.view.num_free_host_blocks) == (10, 0, 6)
    reasons = [row[3:] for row in desk.log.decisions if row[2] == first.id and row[3] in ("preempt", "resume")]
    assert reasons == [("preempt", 10, "swap"), ("resume", 0, "")]
    rows = [dict(zip(STEPS, row, strict=True)) for row in desk.log.steps]
    columns = ("swapped_out", "swapped_in", "num_swapped", "free_host_blocks")
    assert [[row[name] for name in columns] for row in rows] == [[0, 0, 0, 6], [12, 0, 1, 3], [0, 12, 0, 6]]


def test_one_in_mid_prefill_goes_on_where_it_was() -> None:
    desk = Desk(LIMITS)
    request, other = desk.submit(20), desk.submit(3)
    desk.run(Plan(chunks=[(request, 6), (other, 3)]))
    desk.run(Plan(preempt=[(request, Mode.SWAP)], decodes=[other]))
    assert request.num_host_blocks == 2
    step = desk.run(Plan(resume=[request], chunks=[(request, 10)], decode_all=True))
    assert [(c.start, c.num_tokens, c.samples) for c in step.chunks] == [(6, 10, False)]
    assert step.refused == []
    assert (request.num_blocks, request.num_computed_tokens) == (4, 16)


REFUSALS: dict[str, tuple[Callable[[Request, Request, Request], Plan], str]] = {
    "more_than_the_host_holds": (lambda swapped, big, small: Plan(preempt=[(big, Mode.SWAP)]), "no host blocks"),
    "swapping_twice": (lambda swapped, big, small: Plan(preempt=[(swapped, Mode.SWAP)]), "not running"),
    "pausing_who_is_swapped": (lambda swapped, big, small: Plan(preempt=[(swapped, Mode.KEEP)]), "not running"),
    "a_chunk_without_resuming": (
        lambda swapped, big, small: Plan(chunks=[(swapped, 1)]),
        "swapped out and not resumed",
    ),
    "a_decode_without_resuming": (lambda swapped, big, small: Plan(decodes=[swapped]), "not a decode"),
    "coming_back_without_memory": (lambda swapped, big, small: Plan(resume=[swapped]), "no blocks"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_and_leaves_no_trace(case: str) -> None:
    desk = Desk(LIMITS)
    swapped, big, small = decoding(desk, 9, 16, 3)
    late = desk.submit(9)
    desk.run(Plan(preempt=[(swapped, Mode.SWAP)], chunks=[(late, 9)], decode_all=True))
    desk.run(Plan(decode_all=True))
    filler = desk.submit(8)
    desk.run(Plan(chunks=[(filler, 8)], decode_all=True))
    assert desk.plane.num_free_blocks < 3
    make, reason = REFUSALS[case]
    before = (swapped._host_blocks[:], desk.plane.num_free_blocks, desk.plane.view.num_free_host_blocks)
    plan = make(swapped, big, small)
    plan.decodes.append(small)
    step = desk.run(plan)
    assert [why for _, why in step.refused] == [reason]
    assert step.decodes == [small]
    assert before == (swapped._host_blocks, desk.plane.num_free_blocks, desk.plane.view.num_free_host_blocks)
    assert desk.scheduler.queue.count(swapped) == 1


@pytest.mark.parametrize("end", ["cancel", "drop", "recompute", "report"])
def test_host_blocks_are_free_once_a_swapped_request_needs_them_no_more(end: str) -> None:
    desk = Desk(Limits(12, 4, 4, 32, 40, prefix_caching=False, lag=1, num_host_blocks=6))
    first, other = desk.submit(9), desk.submit(5)
    step = desk.plan(Plan(chunks=[(first, 9), (other, 5)]))
    following = desk.plan(Plan(preempt=[(first, Mode.SWAP)], decodes=[other]))
    assert desk.plane.view.num_free_host_blocks == 3
    assert not desk.view_admits(first)  # a step in flight still computes for it
    desk.report(step, *([first] if end == "report" else []))
    if end == "cancel":
        assert desk.plane.cancel(first.id, desk.now)
    elif end == "drop":
        desk.plan(Plan(drop=[(first, "late")]))
    elif end == "recompute":
        desk.plan(Plan(preempt=[(first, Mode.RECOMPUTE)]))
        assert (first.state, first.num_computed_tokens, first.num_preemptions) == (State.WAITING, 0, 2)
        assert desk.scheduler.queue == [first]
    desk.report(following)
    assert desk.plane.view.num_free_host_blocks == 6
    assert desk.plane.num_free_blocks == 10
    assert first.state.ended == (end != "recompute")
    assert desk.scheduler.queue == [first] * (end == "recompute")


def test_a_paused_request_can_be_swapped_out_to_take_its_memory() -> None:
    desk = Desk(LIMITS)
    first, other = decoding(desk, 9, 5)
    desk.run(Plan(preempt=[(first, Mode.KEEP)], decodes=[other]))
    step = desk.run(Plan(preempt=[(first, Mode.SWAP)], decodes=[other]))
    assert step.refused == []
    assert (first.state, first.num_host_blocks, desk.plane.num_free_blocks) == (State.SWAPPED, 3, 10)


def test_no_plan_repeats_itself_while_somebody_is_swapped_out_and_may_come_back() -> None:
    desk = Desk(LIMITS)
    first, other = decoding(desk, 9, 5)
    desk.run(Plan(preempt=[(first, Mode.SWAP)], decodes=[other]))
    repeats = []
    for _ in range(2):
        draft = desk.plane.view.draft()
        assert draft.run_everyone()
        repeats.append(draft.finish(steady=True).repeats)
        desk.run(Plan(resume=[first], decode_all=True))
    assert repeats[0] == 1 < repeats[1]


def test_the_copies_of_a_step_that_runs_nothing_are_in_the_next_that_runs_in_their_order() -> None:
    desk = Desk(LIMITS)
    first, other = decoding(desk, 9, 5)
    assert desk.run(Plan(preempt=[(first, Mode.SWAP)])).copies == []
    assert desk.run(Plan(resume=[first])).copies == []
    assert desk.run(Plan(preempt=[(first, Mode.SWAP)])).copies == []
    step = desk.run(Plan(decodes=[other]))
    assert [copy.out for copy in step.copies] == [True, False, True]
    assert (step.shape.swapped_out, step.shape.swapped_in) == (24, 12)


def test_blocks_that_are_still_cached_are_claimed_on_the_way_back_and_only_the_others_copied() -> None:
    desk = Desk(Limits(12, 4, 4, 32, 40, num_host_blocks=6))
    keys = tuple(block_keys([1] * 12, 4))
    first = desk.submit(14, keys=keys)
    desk.run(Plan(chunks=[(first, 14)]))
    same, held = desk.submit(14, keys=keys), list(first._blocks)
    desk.run(Plan(chunks=[(same, 2)], decode_all=True))
    step = desk.run(Plan(preempt=[(first, Mode.SWAP)], decodes=[same]))
    assert step.shape.swapped_out == 16  # all: the others may let go of the shared ones
    assert desk.plane.view.probe(first).num_tokens == 15
    step = desk.run(Plan(resume=[first], decode_all=True))
    assert step.shape.swapped_in == 4
    assert first._blocks[:3] == held[:3]
    assert step.copies[0].host == (3,)


def test_no_admission_takes_what_is_promised_to_a_request_that_comes_back() -> None:
    """The cached blocks that an admission hits count as free until it claims them; a plan by hand may want too much."""
    desk = Desk(Limits(8, 4, 4, 32, 32, num_host_blocks=6))
    keys = tuple(block_keys([1] * 16, 4))
    gone = desk.submit(16, keys=keys)
    desk.run(Plan(chunks=[(gone, 16)]), gone)
    first, other = desk.submit(8), desk.submit(3)
    desk.run(Plan(chunks=[(first, 8), (other, 3)]))
    desk.run(Plan(preempt=[(first, Mode.SWAP)], decodes=[other]))
    filler = desk.submit(9)
    desk.run(Plan(chunks=[(filler, 9)]))
    same = desk.submit(17, keys=keys)
    assert desk.plane.num_free_blocks == 4  # all idle
    step = desk.run(Plan(resume=[first], chunks=[(same, 1)], decodes=[other]))
    assert step.resumed == [first]
    assert step.refused == [(same, "no blocks")]
    assert step.shape.swapped_in == 8


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_drafted_is_enacted_and_every_token_computes_on_its_own_context(data: st.DataObject) -> None:
    """Swap, pause, recompute, resume, run, admit, cancel at random, shared prefixes (on the host too), either lag."""
    lag = data.draw(st.sampled_from([0, 1]), label="lag")
    limits = Limits(
        data.draw(st.integers(8, 14), label="blocks"), 4, 4, 24, 32, lag=lag,
        prefix_caching=data.draw(st.booleans(), label="caching"),
        num_host_blocks=data.draw(st.sampled_from([3, 8, 40]), label="host"),
    )  # fmt: skip
    offload = data.draw(st.sampled_from(["never", "write_back", "write_through", "after_hits"]), label="offload")
    desk, model = Desk(limits, offload=offload), KvModel(4)
    requests = drawn(data, desk)

    def plan(view: View, now: int) -> Plan:
        draft = view.draft()
        if data.draw(st.booleans(), label="everyone"):
            draft.run_everyone(data.draw(st.sampled_from([None, 3])))
        busy = draft.plan.decode_all or draft.plan.chunks
        for request in requests:
            if request.state in (State.PAUSED, State.SWAPPED):
                mode = data.draw(st.sampled_from([None, None, Mode.RECOMPUTE, Mode.SWAP]), label=f"{request}")
                fits = mode is Mode.RECOMPUTE or (request.state is State.PAUSED and draft.can_swap(request))
                if mode is not None and fits:
                    draft.preempt(request, mode)
            if busy or request.state is not State.RUNNING:
                continue
            move = data.draw(st.sampled_from(["run", "run", *Mode, "idle"]), label=f"{request}")
            if isinstance(move, Mode):
                if move is not Mode.SWAP or draft.can_swap(request):
                    draft.preempt(request, move)
            elif move == "run" and request.num_output_tokens < request.max_tokens and draft.tokens_left:
                tokens = min(request.num_pending_tokens, draft.tokens_left)
                if draft.blocks_needed(request, tokens) <= draft.blocks_left:
                    draft.run(request, tokens)
        named = {r.id for r, _ in draft.plan.preempt}
        for request in list(desk.scheduler.queue):
            if request.id not in named and data.draw(st.booleans(), label=f"admit {request}"):
                draft.admit(request, max_chunk=data.draw(st.sampled_from([None, 5])))
            elif limits.prefix_caching and request.state is State.WAITING and request.id not in named:
                draft.plan.fetch.append((request, "host"))
        return draft.finish()

    desk.scheduler.answer = plan
    flight: list[Step] = []

    def report() -> None:
        step = flight.pop(0)
        sampled = {c.request for c in step.chunks if c.samples} | {*step.decodes, *step.capped}
        ended = (r for r in sampled if not r.state.ended and r.num_output_tokens == r.max_tokens)
        desk.report(step, *sorted(ended, key=lambda r: r.id))

    for _ in range(14):
        alive = [r for r in requests if not r.state.ended]
        if alive and not data.draw(st.integers(0, 9), label="cancel"):
            desk.plane.cancel(alive[data.draw(st.integers(0, len(alive) - 1))].id, desk.now)
        step = desk.plane.plan(desk.now)
        assert step.refused == []
        desk.plane._empty_plans = 0  # idling is allowed here
        if step.runs:
            flight.append(step)
            model.run(step, list(desk.plane.decode_group()) if step.decode_all else [])
        if flight and (len(flight) > lag or not step.runs):
            report()
    for request in requests:
        desk.plane.cancel(request.id, desk.now)
    assert (desk.plane.num_free_blocks, desk.plane.view.num_free_host_blocks) == (
        limits.num_blocks,
        limits.num_host_blocks,
    )


class Modelled(Operated):
    """A drive whose steps are carried out token by token."""

    def __init__(self, limits: Limits, stack: StackSpec, work: list[Job], acts: dict[int, Act] | None = None) -> None:
        self.model = KvModel(limits.block_size)
        super().__init__(limits, stack, work, acts or {})

    def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
        self.model.run(step, list(self.plane.decode_group()) if step.decode_all else [])
        return super()._execute(step)


STACKS = [
    StackSpec(scheduler)
    for scheduler in (
        "mixed", "prefill_first", "orca", "static,max_batch_size=3", "sarathi,chunk_size=24", "sglang", "every,n=3",
        "andes,horizon_ms=0.05,memory=0.5,ttft_ms=0.005,tokens_per_s=300000", "scorpio", "continuum",
    )
]  # fmt: skip
STACKS += [StackSpec("preemptive", "srpt"), StackSpec("preemptive,mode=keep", "mlfq"), StackSpec(queue="vtc")]
STACKS += [StackSpec("preemptive,mode=swap", "srpt"), StackSpec("preemptive,mode=cheapest", "las,quantum_ms=0")]
STACKS += [StackSpec(queue="dlpm"), StackSpec(admission="predicted_peak"), StackSpec(admission="reserve_pow2")]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: f"{stack.scheduler} {stack.queue} {stack.admission}")
@pytest.mark.parametrize("lag", [0, 1])
def test_under_every_scheduler_swapped_requests_come_back_and_end_with_their_tokens(stack: StackSpec, lag: int) -> None:
    swapping = StackSpec(stack.scheduler, stack.queue, stack.admission, "last_admitted,mode=swap")
    for caching in (False, True):
        work = [
            Job(8 + 3 * i, 30, i, keys=tuple(block_keys([1] * 8 + [i] * 60, 4)), tenant="ab"[i % 2], program=i % 3)
            for i in range(6)
        ]
        limits = Limits(24, 4, 6, 32, 110, prefix_caching=caching, lag=lag, num_host_blocks=40)
        drive = Modelled(limits, swapping, work)
        assert [drive.output_tokens(i) for i in range(6)] == [30] * 6
        kinds = [dict(zip(DECISIONS, row, strict=True)) for row in drive.log.decisions]
        assert not [row for row in kinds if row["kind"] == "refused"]
        shortage = stack.scheduler.split(",")[0] not in ("static", "preemptive", "andes")
        shortage = (shortage or "mode=swap" in stack.scheduler) and stack.admission == "full_prompt"
        assert {row["reason"] for row in kinds if row["kind"] == "preempt"} >= ({"swap"} if shortage else set())
        assert drive.plane.view.num_free_host_blocks == 40


def test_an_order_of_arrival_puts_a_swapped_request_before_those_that_came_later() -> None:
    work = [Job(8, 24, 0), Job(8, 24, 0), *(Job(8, 4, 20) for _ in range(3))]
    stack = StackSpec(preemption="last_admitted,mode=swap")
    drive = Drive(Limits(12, 4, 6, 32, 40, prefix_caching=False, num_host_blocks=20), stack, work)
    order = [
        (row["request_id"], row["kind"])
        for row in (dict(zip(DECISIONS, row, strict=True)) for row in drive.log.decisions)
        if row["kind"] in ("preempt", "admit", "resume") and row["step"] > 0
    ]
    assert order[0] == (1, "preempt")
    assert order.index((1, "resume")) < order.index((2, "admit"))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.builds(Job, st.integers(1, 40), st.integers(1, 30), st.integers(0, 12)), min_size=2, max_size=8),
    st.dictionaries(
        st.integers(1, 50),
        st.one_of(
            st.builds(_change, scheduler=st.sampled_from(["mixed", "orca", "sglang", "static,max_batch_size=3"])),
            st.builds(_change, preemption=st.sampled_from(["last_admitted,mode=swap", "longest"])),
            st.builds(_change, admission=st.sampled_from(["reserve_max", "watermark", "predicted_peak"])),
        ),
        max_size=5,
    ),
    st.sampled_from([0, 1]),
    st.sampled_from([8, 60]),
)
def test_other_policies_may_take_over_while_requests_are_swapped_out(
    work: list[Job], acts: dict[int, Act], lag: int, host: int
) -> None:
    limits = Limits(20, 4, 6, 32, 80, prefix_caching=False, lag=lag, num_host_blocks=host)
    drive = Modelled(limits, StackSpec(preemption="last_admitted,mode=swap"), work, acts)
    assert [drive.output_tokens(i) for i in range(len(work))] == [job.output for job in work]
    assert drive.plane.view.num_free_host_blocks == host


@pytest.mark.parametrize("context", [8, 24, 56])
def test_the_cheapest_way_is_never_dearer_than_either(context: int) -> None:
    """With the harness's costs a context of n is computed in 200 + 20n + n(n+1)/16 and swapped in 8 ns a token."""
    desk = Desk(Limits(40, 4, 4, 64, 100, prefix_caching=False, num_host_blocks=20))
    stack = StackSpec(preemption="cheapest").build(block_size=4)
    cost = LinearCost()
    assert swap_ns(cost, context) == 8 * context
    (request,) = decoding(desk, context)
    view = desk.plane.view
    desk.plane._state.cost = cost
    victim = stack.preemption.victim(view, view.draft(), 0)
    assert victim == (request, Mode.SWAP)
    dear = LinearCost()
    dear.step_ns = lambda shape: LinearCost().step_ns(shape) + 100_000 * (shape.swapped_in > 0)  # type: ignore[method-assign]
    desk.plane._state.cost = dear
    assert swap_ns(dear, context) > prefill_ns(dear, context + 1)
    assert stack.preemption.victim(view, view.draft(), 0) == (request, Mode.RECOMPUTE)


def test_a_host_pool_hands_out_runs_and_notices_a_block_that_is_lost() -> None:
    pool = HostPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second, pool.num_free) == ([0, 1, 2], [3, 4], 3)
    pool.release(first)
    assert pool.allocate(3) == [0, 1, 2]
    pool.check([first, second])
    with pytest.raises(AssertionError, match="not conserved"):
        pool.check([first])
