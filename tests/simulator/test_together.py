"""Decode steps taken together: the same rows as one by one, whatever the policies, and fewer plans asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from policies.contract import View
from policies.control_plane import ControlPlane
from policies.plan import Plan, Report, Step
from policies.prefix import chain_key, root_key
from policies.queues.fcfs import Fcfs
from policies.records import STEPS
from policies.registry import make
from policies.replica_state import Limits
from policies.request import Request
from policies.schedulers.mixed import Mixed
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.library import EVERY, says

LIMITS = Limits(60, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=160)
COST = LinearCost(1_000.4, 10.3, 0.7)
STEP = {name: i for i, name in enumerate(STEPS)}


@dataclass
class Rows:
    """Every row in the order in which it came."""

    rows: list[tuple[object, ...]] = field(default_factory=list)

    def request(self, row: tuple[object, ...]) -> None:
        self.rows.append(tuple(list(value) if isinstance(value, list) else value for value in row))

    def step(self, row: tuple[object, ...]) -> None:
        self.rows.append(row)

    def decision(self, row: tuple[object, ...]) -> None:
        self.rows.append(row)


def arrivals(seed: int, n: int = 12) -> list[Arrival]:
    """Bursts with long gaps between them, so that there is now a queue and now nothing but decodes."""
    draw = np.random.default_rng(seed)
    made, at = [], 0
    for i in range(n):
        at += int(draw.choice([0, 900, 60_000], p=[0.4, 0.3, 0.3]))
        prompt, output = int(draw.integers(1, 40)), int(draw.integers(1, 90))
        cap = output + int(draw.integers(0, 2) * draw.integers(0, 20))
        keys, key = [], chain_key(root_key(), [int(draw.integers(0, 3)) if prompt > 8 else 10 + i])
        for depth in range((prompt + output) // 4):
            key = chain_key(key, [depth])
            keys.append(key)
        hints = {"output_tokens": float(output)}
        request = Request(i, at, prompt, cap, f"t{i % 3}", i % 5, i % 5, (), i % 2, None, hints)
        made.append(Arrival(request, output, keys))
    return made


def run(
    stack: StackSpec, limits: Limits, todo: list[Arrival], *, together: bool
) -> tuple[list[tuple[object, ...]], int]:
    """The rows, and the steps that were not asked for."""
    rows, oracle = Rows(), {a.request.id: a.output_tokens for a in todo}
    built = stack.build(block_size=4, seed=3, oracle=oracle, future={a.request.id: list(a.keys) for a in todo})
    simulation = Simulation(limits, [built], COST, recorder=rows, check=together, together=together)
    simulation.run(todo)
    plane = simulation.replicas[0].plane
    return rows.rows, plane.next_step - plane.num_asked


@pytest.mark.parametrize("stack", EVERY, ids=says)
def test_the_rows_are_the_same_with_steps_taken_together(stack: StackSpec) -> None:
    for seed, limits in enumerate((LIMITS, Limits(**{**_fields(LIMITS), "lag": 1, "plan_lead_ns": 300}))):
        together, _ = run(stack, limits, arrivals(seed), together=True)
        one_by_one, _ = run(stack, limits, arrivals(seed), together=False)
        assert together == one_by_one


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", ["mixed", "sarathi", "prefill_first", "orca", "sglang"])
def test_who_follows_from_an_end_comes_at_the_same_time_with_steps_taken_together(scheduler: str, lag: int) -> None:
    """Every other request comes after the one before it has ended: at once, soon, or much later."""
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "lag": lag})
    rows, counts = [], []
    for together in (True, False):
        todo = arrivals(11, 24)
        gaps = {2 * k: (todo[2 * k + 1], [0, 700, 90_000][k % 3]) for k in range(12)}
        seen, plans = Rows(), 0

        def follow(request: Request, now: int, gaps: dict = gaps) -> list[Arrival]:
            if request.id not in gaps:
                return []
            arrival, gap = gaps[request.id]
            arrival.request.arrival_ns = now + gap
            return [arrival]

        built = StackSpec(scheduler).build(block_size=4, seed=3)
        simulation = Simulation(limits, [built], COST, recorder=seen, followers=follow, check=True, together=together)
        plan = simulation.replicas[0].plane.plan

        def counted(now: int, plan: object = plan) -> object:
            nonlocal plans
            plans += 1
            return plan(now)  # type: ignore[operator]

        simulation.replicas[0].plane.plan = counted  # type: ignore[method-assign,assignment]
        simulation.run(todo[::2])
        assert all(a.request.finish_ns for a in todo)
        rows.append(seen.rows)
        counts.append(plans)
    assert rows[0] == rows[1]
    assert counts[0] < 0.7 * counts[1]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", ["mixed", "sarathi", "prefill_first", "orca", "sglang"])
def test_most_steps_of_decodes_alone_are_not_asked_for(scheduler: str, lag: int) -> None:
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "lag": lag})
    rows, repeated = run(StackSpec(scheduler), limits, arrivals(5), together=True)
    alone = sum(len(row) == len(STEPS) and row[6] > 0 and row[9] == 0 for row in rows)  # type: ignore[operator]
    assert repeated > 0.5 * alone


def crowd(n: int = 24) -> list[Arrival]:
    """More than have room, and nobody comes later."""
    draw, made = np.random.default_rng(11), []
    for i in range(n):
        prompt, output = (int(x) for x in draw.integers(8, 30, 2))
        keys = [
            chain_key(root_key(), [depth if depth < 2 else 10 * i + depth]) for depth in range((prompt + output) // 4)
        ]
        made.append(Arrival(Request(i, i, prompt, output + int(draw.integers(0, 9))), output, keys))
    return made


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("short_of", ["slots", "blocks", "blocks, cached"])
@pytest.mark.parametrize("scheduler", ["mixed", "sarathi", "prefill_first", "orca"])
def test_steps_are_taken_together_while_the_first_in_line_waits_for_room(
    scheduler: str, short_of: str, lag: int
) -> None:
    sizes = {"max_num_seqs": 4, "num_blocks": 400} if short_of == "slots" else {"num_blocks": 40}
    limits = Limits(**{**_fields(LIMITS), **sizes, "lag": lag, "prefix_caching": short_of != "blocks"})
    stack = StackSpec(scheduler, admission="full_prompt" if scheduler == "mixed" else "watermark,watermark=0")
    together, repeated = run(stack, limits, crowd(), together=True)
    one_by_one, _ = run(stack, limits, crowd(), together=False)
    assert together == one_by_one
    steps = [row for row in together if len(row) == len(STEPS)]
    waiting = sum(row[STEP["num_waiting"]] > 0 and row[STEP["num_chunks"]] == 0 for row in steps)  # type: ignore[operator]
    idle = sum(row[STEP["num_waiting"]] == 0 and row[STEP["num_chunks"]] == 0 for row in steps)
    assert waiting > 20
    if short_of != "blocks, cached":
        assert repeated > 0.3 * waiting + 0.5 * idle


def long_prompts(seed: int, n: int = 14) -> list[Arrival]:
    """Prompts of many chunks, of every length, beside decodes; many share their beginnings."""
    draw, made, at = np.random.default_rng(seed), [], 0
    for i in range(n):
        at += int(draw.choice([0, 2_000, 30_000], p=[0.3, 0.4, 0.3]))
        prompt, output = int(draw.integers(1, 120)), int(draw.integers(1, 60))
        keys = (
            chain(int(draw.integers(0, 3)), (prompt + output) // 4) if i % 2 else chain(10 + i, (prompt + output) // 4)
        )
        made.append(Arrival(Request(i, at, prompt, output + int(draw.integers(0, 9))), output, keys))
    return made


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("blocks", [45, 400])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("scheduler", ["sarathi,chunk_size={}", "mixed", "orca"])
def test_chunks_that_go_on_are_taken_together_with_the_decodes_beside_them(
    scheduler: str, lag: int, blocks: int, cached: bool
) -> None:
    for seed, size in enumerate((9, 12, 16)):
        budget = 64 if "{}" in scheduler else size
        sizes = {"num_blocks": blocks, "lag": lag, "prefix_caching": cached, "max_num_batched_tokens": budget}
        limits = Limits(**{**_fields(LIMITS), **sizes})
        stack = StackSpec(scheduler.format(size), admission="watermark")
        together, repeated = run(stack, limits, long_prompts(seed), together=True)
        one_by_one, _ = run(stack, limits, long_prompts(seed), together=False)
        assert together == one_by_one
        steps = [row for row in together if len(row) == len(STEPS)]
        alone = sum(row[STEP["num_chunks"]] == 0 for row in steps)
        assert blocks < 400 or repeated > 0.95 * alone


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", ["mixed", "orca", "sarathi,chunk_size=24"])
def test_a_prompt_of_many_chunks_is_asked_about_when_it_comes_and_no_more(scheduler: str, lag: int) -> None:
    """Beside a decode that goes on; what else is asked for are the first request's prompt and the end of all."""
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "max_num_batched_tokens": 24, "lag": lag})
    asked = []
    for others in range(3):
        later = [Arrival(Request(i, 30_000 * i, 100, 20), 20) for i in range(1, others + 1)]
        todo = [Arrival(Request(0, 0, 10, 150), 150), *later]
        rows, repeated = run(StackSpec(scheduler), limits, todo, together=True)
        asked.append(sum(len(row) == len(STEPS) for row in rows) - repeated)
    assert asked[1] - asked[0] == asked[2] - asked[1] == 1


def test_a_block_evicted_of_the_first_who_waits_has_the_policy_asked() -> None:
    """A smaller hit is a chunk that ends sooner, where tokens limit it, and may need a block less."""
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 45, "max_num_batched_tokens": 40})
    stack = StackSpec("mixed", admission="watermark,watermark=0")
    together, one_by_one = (run(stack, limits, long_prompts(100_339, 30), together=t)[0] for t in (True, False))
    assert together == one_by_one


def test_a_queue_whose_order_changes_as_requests_run_is_asked_while_somebody_waits() -> None:
    limits = Limits(**{**_fields(LIMITS), "max_num_seqs": 4, "num_blocks": 400})
    (_, ordered), (_, changing) = (
        run(StackSpec("mixed", queue), limits, crowd(), together=True) for queue in ("sjf", "vtc")
    )
    assert changing < 0.5 * ordered


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("router", ["round_robin", "least_tokens", "kv_aware"])
@pytest.mark.parametrize("cached", [False, True])
def test_several_replicas_behind_a_router_give_the_same_rows_too(router: str, lag: int, cached: bool) -> None:
    limits = Limits(**{**_fields(LIMITS), "lag": lag, "prefix_caching": cached})
    found = []
    for together in (True, False):
        rows, chosen = Rows(), make("router", router, seed=2, block_size=4, cost=COST)
        stacks = [StackSpec().build(block_size=4) for _ in range(3)]
        simulation = Simulation(limits, stacks, COST, chosen, recorder=rows, check=True, together=together)
        simulation.at(30_000, lambda simulation=simulation: simulation.fail(1))
        end = simulation.run(arrivals(4, 40))
        found.append((end, rows.rows))
        asked = [replica.plane.num_asked for replica in simulation.replicas]
        steps = [replica.plane.next_step for replica in simulation.replicas]
        assert (sum(asked) < 0.7 * sum(steps)) == together
    assert found[0] == found[1]


@pytest.mark.parametrize(("lag", "cached"), [(0, True), (0, False), (1, True)])
def test_an_end_in_time_finds_the_replica_as_it_is_then(lag: int, cached: bool) -> None:
    limits, found = Limits(**{**_fields(LIMITS), "lag": lag, "prefix_caching": cached}), []
    for together in (True, False):
        ends = []
        for until_ns in range(20_000, 90_000, 7_001):
            rows = Rows()
            simulation = Simulation(limits, [StackSpec().build(block_size=4)], COST, recorder=rows, together=together)
            ends.append((simulation.run(arrivals(5), until_ns), rows.rows))
        found.append(ends)
    assert found[0] == found[1]


class Hearing(Fcfs):
    """The same order by a queue that listens."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        self.heard.append(report.step.index)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_policy_that_listens_hears_of_every_step(lag: int) -> None:
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "lag": lag})
    found = []
    for listens in (True, False):
        rows, stack, queue = Rows(), StackSpec().build(block_size=4), Hearing()
        if listens:
            stack.scheduler = Mixed(queue)
        assert stack.ignores_reports() != listens
        simulation = Simulation(limits, [stack], COST, recorder=rows, check=True)
        simulation.run(arrivals(5))
        found.append(rows.rows)
        if listens:
            ran = [row[1] for row in rows.rows if len(row) == len(STEPS) and row[STEP["padded_tokens"]]]  # type: ignore[operator]
            assert queue.heard == ran
            assert simulation.replicas[0].plane.num_asked < 0.7 * len(ran)
    assert found[0] == found[1]


class Briefly(Mixed):
    """Says of no plan that it will do for more than four steps."""

    def plan(self, view: View, now: int) -> Plan:
        plan = super().plan(view, now)
        if plan.decode_all and not plan.chunks:
            plan.repeats = 4
        return plan


@pytest.mark.parametrize("lag", [0, 1])
def test_a_policy_is_asked_again_after_as_many_steps_as_it_said(lag: int) -> None:
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "lag": lag, "prefix_caching": False})
    stack = StackSpec().build(block_size=4)
    stack.scheduler = Briefly(Fcfs())
    assert stack.ignores_reports()
    simulation = Simulation(limits, [stack], COST, check=True)
    simulation.run([Arrival(Request(i, 0, 8, 101), 101) for i in range(3)])
    plane = simulation.replicas[0].plane
    # A step of prompts, a hundred of decodes, and with lag a few plans that find nothing left to do.
    assert 101 <= plane.next_step <= 104
    assert 26 <= plane.num_asked <= 30


@pytest.mark.parametrize("cached", [False, True])
def test_where_nobody_listens_most_steps_make_no_step_object(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    made = 0
    init = Step.__init__

    def counted(self: Step, *given: int, **named: int) -> None:
        nonlocal made
        made += 1
        init(self, *given, **named)

    monkeypatch.setattr(Step, "__init__", counted)
    limits = Limits(**{**_fields(LIMITS), "num_blocks": 400, "prefix_caching": cached})
    rows, _ = run(StackSpec("sarathi", admission="watermark"), limits, arrivals(5), together=True)
    assert 0 < made < 0.5 * sum(len(row) == len(STEPS) for row in rows)


def test_a_plan_that_repeats_is_taken_no_more_often_than_it_says() -> None:
    plane = ControlPlane(LIMITS, StackSpec().build(block_size=4))
    assert plane.repeat(0) is None
    plane.submit(Request(0, 0, 4, 50), 0)
    assert plane.repeat(0) is None  # somebody has come


def _fields(limits: Limits) -> dict[str, object]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


@pytest.mark.parametrize(("lag", "cached"), [(0, True), (0, False), (1, True)])
def test_who_interferes_finds_the_replica_as_it_is_then(lag: int, cached: bool) -> None:
    limits, todo = Limits(**{**_fields(LIMITS), "lag": lag, "prefix_caching": cached}), arrivals(7)
    ends = []
    for together in (True, False):
        simulation = Simulation(limits, [StackSpec().build(block_size=4)], COST, check=True, together=together)
        for at in range(500, 60_000, 5_000):
            simulation.at(at, lambda number=at // 5_000, simulation=simulation: simulation.cancel(number))
        requests = [Request(a.request.id, a.request.arrival_ns, 8, 60) for a in todo]
        simulation.run(Arrival(request, 60) for request in requests)
        ends.append([(request.state, request.finish_ns) for request in requests])
    assert ends[0] == ends[1]
    assert any(state.value == "cancelled" for state, _ in ends[0])


@pytest.mark.parametrize("queue", ["mlfq,quantum_ms=0.005", "las,quantum_ms=0.005", "plas,quantum_ms=0.005", "ltr"])
@pytest.mark.parametrize("seed", range(3))
def test_a_queue_that_looks_at_running_requests_before_each_plan_is_asked_for_each(queue: str, seed: int) -> None:
    stack = StackSpec("preemptive", queue)
    assert (
        run(stack, LIMITS, arrivals(seed, 40), together=True)[0]
        == run(stack, LIMITS, arrivals(seed, 40), together=False)[0]
    )


def chain(first: int, length: int) -> list[bytes]:
    """Keys of a text's blocks."""
    keys, key = [], chain_key(root_key(), [first])
    for depth in range(length):
        key = chain_key(key, [depth])
        keys.append(key)
    return keys


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", ["mixed", "sarathi", "orca", "prefill_first"])
def test_a_block_that_a_decode_fills_for_the_first_who_waits_has_the_policy_asked(scheduler: str, lag: int) -> None:
    """The prompt that waits repeats what is being generated, so that each block that fills is one less for it."""
    limits = Limits(30, block_size=4, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=120, lag=lag)
    stack = StackSpec(scheduler=scheduler, admission="full_prompt")

    def todo(prompt: int) -> list[Arrival]:
        return [
            Arrival(Request(0, 0, 14, 40), 40, chain(0, 20)),
            Arrival(Request(1, 0, 5, 60), 60, chain(1, 30)),
            Arrival(Request(2, 3000, prompt, 4), 4, chain(1, 30)),
        ]

    for prompt in range(88, 104):
        one_by_one, _ = run(stack, limits, todo(prompt), together=False)
        assert run(stack, limits, todo(prompt), together=True)[0] == one_by_one
