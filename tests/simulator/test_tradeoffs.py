"""Where more is not better: a step's token budget, and the order of the shortest where stopping costs a recompute."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from policies.records import STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log

MS = 1_000_000
COSTS = LinearCost(6.3 * MS, 0.02 * MS)
BUDGETS = (64, 128, 256, 512, 1024, 2048)


def serve(
    stack: StackSpec, work: list[tuple[int, int, int]], limits: Limits, costs: LinearCost
) -> tuple[list[Request], Log]:
    """Requests of (arrival, prompt, output)."""
    log, oracle = Log(), {i: output for i, (_, _, output) in enumerate(work)}
    requests = [Request(i, at, prompt, 500) for i, (at, prompt, _) in enumerate(work)]
    simulation = Simulation(limits, [stack.build(oracle=oracle)], costs, recorder=log)
    simulation.run(Arrival(request, oracle[request.id]) for request in requests)
    return requests, log


def under_budget(budget: int, work: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Mean time to first token and the longest step, in ms, of Sarathi."""
    limits = Limits(4_000, 16, 128, budget, 4_096, prefix_caching=False)
    requests, log = serve(StackSpec(f"sarathi,chunk_size={budget}"), work, limits, COSTS)
    steps = [dict(zip(STEPS, row, strict=True)) for row in log.steps]
    ttft = np.mean([request.first_token_ns - request.arrival_ns for request in requests])  # type: ignore[operator]
    return float(ttft) / MS, max(step["end_ns"] - step["plan_ns"] for step in steps) / MS


def test_the_worked_example_of_four_prompts_that_come_together() -> None:
    """Oracle C1. 512 tokens each. A step of 512 takes 6.3 + 10.24 = 16.54 ms: 16.54 x (1 + 2 + 3 + 4) / 4. A step of
    1,024 takes 26.78: two prompts each, 26.78 x (1 + 2) / 2. One of 2,048 takes 47.26, for all. One of 128, 8.86: 4 a
    prompt, 8.86 x 4 x (1 + 2 + 3 + 4) / 4."""
    means = [under_budget(budget, [(0, 512, 1)] * 4)[0] for budget in (128, 512, 1024, 2048)]
    assert means == pytest.approx([88.6, 41.35, 40.17, 47.26])


def test_the_longest_step_grows_with_the_budget_and_the_time_to_first_token_falls_and_rises_again() -> None:
    """Oracle C1: bursts of eight prompts of 200 to 400 tokens, 40 tokens out. A small budget pays for many steps; with
    a large one, whoever comes first waits for whoever shares the step."""
    random = np.random.default_rng(3)
    work = [(burst * 700 * MS, int(random.integers(200, 401)), 40) for burst in range(6) for _ in range(8)]
    ttfts, longest = zip(*(under_budget(budget, work) for budget in BUDGETS), strict=True)
    assert longest == pytest.approx([6.3 + 0.02 * budget for budget in BUDGETS])  # 7.6 8.9 11.4 16.5 26.8 47.3
    best = ttfts.index(min(ttfts))
    assert 0 < best < len(BUDGETS) - 1
    assert list(ttfts[: best + 1]) == sorted(ttfts[: best + 1], reverse=True)
    assert list(ttfts[best:]) == sorted(ttfts[best:])
    assert ttfts[0] > 1.5 * ttfts[best]
    assert ttfts[-1] > 1.05 * ttfts[best]


@cache
def in_overload(scheduler: str, queue: str) -> tuple[float, float]:
    """Mean and 99th percentile of the time to the end, in seconds: 5 a second where some 4 can be served."""
    random = np.random.default_rng(1)
    arrivals = np.cumsum(random.exponential(200 * MS, 400)).astype(np.int64).tolist()
    prompts = np.clip(random.lognormal(np.log(600), 0.8, 400), 1, 3_000).astype(int).tolist()
    outputs = np.clip(random.exponential(100, 400), 1, 500).astype(int).tolist()
    limits = Limits(700, 16, 64, 512, 4_096, prefix_caching=False)
    stack = StackSpec(scheduler, f"{queue},predictor=oracle" if queue != "fcfs" else queue)
    work = list(zip(arrivals, prompts, outputs, strict=True))
    requests, _ = serve(stack, work, limits, LinearCost(20 * MS, 0.1 * MS))
    times = [(request.finish_ns - request.arrival_ns) / 1e9 for request in requests]  # type: ignore[operator]
    return float(np.mean(times)), float(np.quantile(times, 0.99))


def test_where_a_stop_costs_a_recompute_preemptive_srpt_loses_to_sjf_and_both_beat_fcfs_but_for_the_last() -> None:
    """Oracle B6: means of 19.7, 9.1 and 14.7 s, 99th percentiles of 41, 86 and 103 s."""
    fcfs, sjf, srpt = in_overload("mixed", "fcfs"), in_overload("mixed", "sjf"), in_overload("preemptive", "srpt")
    assert 1.3 * sjf[0] < srpt[0] < 0.8 * fcfs[0]
    assert min(sjf[1], srpt[1]) > 1.5 * fcfs[1]
