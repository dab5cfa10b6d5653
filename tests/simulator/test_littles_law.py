"""Little's law for parts of the system: the queue alone, and the blocks of KV. The whole: `tests/experiments`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from policies.records import DECISIONS, REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log

BLOCK = 16


class Books:
    """What a run has left on record, to be added up in two ways: from its steps, and from its requests."""

    def __init__(self, stack: StackSpec, num_blocks: int) -> None:
        random, log = np.random.default_rng(6), Log()
        arrivals = np.cumsum(random.exponential(7e6, 100)).astype(np.int64).tolist()
        prompts, outputs = random.integers(1, 200, 100).tolist(), random.integers(1, 60, 100).tolist()
        self.limits = Limits(num_blocks, BLOCK, 8, 200, 300, prefix_caching=False)
        built = stack.build(oracle=dict(enumerate(outputs)))
        requests = [
            Request(i, at, n, 64, hints={"output_tokens": outputs[i]})
            for i, (at, n) in enumerate(zip(arrivals, prompts, strict=True))
        ]
        simulation = Simulation(self.limits, [built], LinearCost(1e6, 5e3), recorder=log)
        simulation.run(Arrival(r, n) for r, n in zip(requests, outputs, strict=True))
        self.steps = _named(STEPS, log.steps)
        self.requests = _named(REQUESTS, log.requests)
        self.decisions: dict[int, list[dict[str, Any]]] = {row["request_id"]: [] for row in self.requests}
        for decision in _named(DECISIONS, log.decisions):
            self.decisions.get(decision["request_id"], []).append(decision)
        self.plan_ns = {step["step"]: step["plan_ns"] for step in self.steps}
        self.step_of_clock = {step["decode_clock"]: step["step"] for step in self.steps if step["decode_clock"]}

    def held(self, column: str) -> int:
        """The integral of a column over time. A plan's state lasts until its step has ended."""
        return sum(step[column] * (step["end_ns"] - step["plan_ns"]) for step in self.steps)

    def held_blocks(self) -> int:
        free = sum(self.held(column) for column in ("free_blocks", "idle_blocks"))
        return self.limits.num_blocks * sum(step["end_ns"] - step["plan_ns"] for step in self.steps) - free

    def waited(self, request: dict[str, Any]) -> int:
        """From the plan that could first have seen it, or that preempted it, to the one that admitted it."""
        since, total = next(step["plan_ns"] for step in self.steps if step["step"] >= request["before_step"]), 0
        for decision in self.decisions[request["request_id"]]:
            at = self.plan_ns[decision["step"]]
            if decision["kind"] == "admit":
                total += at - since
            elif decision["kind"] == "preempt":
                since = at
        return total

    def block_time(self, request: dict[str, Any]) -> int:
        """Blocks times how long it held them, from the steps in which it computed so many tokens."""
        changes = {d["step"]: d for d in self.decisions[request["request_id"]] if d["kind"] in ("chunk", "preempt")}
        runs = request["decode_runs"]
        clocks = [k for a, b in zip(runs[::2], runs[1::2], strict=True) for k in range(a + 1, b + 1)]
        tokens = {*request["token_steps"], *(self.step_of_clock[k] for k in clocks)}
        computed, held = 0, []
        for step in sorted(tokens | changes.keys()):
            change = changes.get(step)
            if change is None:
                computed += 1
            else:
                computed = 0 if change["kind"] == "preempt" else computed + change["tokens"]
            held.append((self.plan_ns[step], -(-computed // BLOCK)))
        return sum(n * (b - a) for (a, n), (b, _) in pairwise([*held, (request["finish_ns"], 0)]))


def _named(columns: dict[str, str], rows: list[tuple]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in rows]


@pytest.mark.parametrize("num_blocks", [45, 1_000], ids=["tight", "ample"])
@pytest.mark.parametrize(
    "stack",
    [StackSpec(), StackSpec("prefill_first"), StackSpec("sglang"), StackSpec("preemptive", "srpt,predictor=oracle")],
    ids=["mixed", "prefill_first", "sglang", "preemptive"],
)
def test_of_the_queue_and_of_blocks_the_mean_is_the_rate_times_the_mean_time(stack: StackSpec, num_blocks: int) -> None:
    """Oracle A4: L = lambda W holds to the nanosecond for a run that begins and ends empty."""
    books = Books(stack, num_blocks)
    assert sum(map(books.waited, books.requests)) == books.held("num_waiting") > 0
    assert sum(map(books.block_time, books.requests)) == books.held_blocks() > 0
    assert sum(request["preemptions"] for request in books.requests) > 3 or num_blocks > 45
