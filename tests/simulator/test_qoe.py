"""Andes under pressure: users wait less for what they read, with the same memory and the same work."""

from __future__ import annotations

import numpy as np

from policies.qoe import qoe
from policies.records import REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log

MS = 1_000_000
TTFT_NS, TPOT_NS = 1000 * MS, 200 * MS


def experience(scheduler: str, rate: float, blocks: int, slots: int, seed: int = 3, count: int = 150) -> list[float]:
    """QoE of each request: Poisson arrivals a second, prompts of 64 to 256 tokens, outputs of 50 to 250.

    300 blocks are memory for about 16 of them; a decode step takes some 26 ms, an eighth of a user's time for a token.
    """
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1e9 / rate, count)).astype(np.int64).tolist()
    prompts, outputs = random.integers(64, 257, count).tolist(), random.integers(50, 251, count).tolist()
    slo = Slo(ttft_ns=TTFT_NS, tpot_ns=TPOT_NS)
    requests = [Request(i, at, n, 300, slo=slo) for i, (at, n) in enumerate(zip(arrivals, prompts, strict=True))]
    log = Log()
    limits = Limits(num_blocks=blocks, max_num_seqs=slots, max_num_batched_tokens=512, prefix_caching=False)
    costs = LinearCost(20 * MS, 0.1 * MS, 0.001 * MS)
    simulation = Simulation(limits, [StackSpec(scheduler).build()], costs, recorder=log)
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs, strict=True))
    steps = [dict(zip(STEPS, row, strict=True)) for row in log.steps]
    ends = {step["step"]: step["end_ns"] for step in steps}
    by_clock = {step["decode_clock"]: step["end_ns"] for step in steps if step["decode_clock"]}
    found = []
    for row in log.requests:
        request = dict(zip(REQUESTS, row, strict=True))
        runs = request["decode_runs"]
        times = [ends[step] for step in request["token_steps"]]
        times += [by_clock[k] for a, b in zip(runs[::2], runs[1::2], strict=True) for k in range(a + 1, b + 1)]
        assert len(times) == outputs[request["request_id"]]
        found.append(qoe([at - request["arrival_ns"] for at in sorted(times)], TTFT_NS, TPOT_NS))
    return found


SEEDS = (1, 3)


def means(scheduler: str, rate: float, blocks: int, slots: int) -> list[float]:
    return [float(np.mean(experience(scheduler, rate, blocks, slots, seed))) for seed in SEEDS]


def test_with_too_little_memory_the_mean_experience_is_better_than_first_come_first_served() -> None:
    """8 requests a second, 300 blocks: FCFS 0.75, 0.75; Andes 0.80, 0.85."""
    for andes, fcfs in zip(means("andes", 8, 300, 64), means("mixed", 8, 300, 64), strict=True):
        assert andes > fcfs + 0.03


def test_where_pausing_costs_nothing_users_with_full_buffers_make_way_for_others() -> None:
    """5 a second, 16 slots, memory in plenty: FCFS 0.92, 0.92; Andes 0.95, 0.96; with cap=4 1.00, 0.99."""
    fcfs, once, often = (means(scheduler, 5, 4000, 16) for scheduler in ("mixed", "andes", "andes,cap=4"))
    for first_come, andes, more in zip(fcfs, once, often, strict=True):
        assert first_come + 0.02 < andes < more
        assert more > 0.96


def test_with_plenty_of_everything_everybody_reads_without_waiting() -> None:
    assert means("andes", 2, 4000, 64) == [1.0] * 2
