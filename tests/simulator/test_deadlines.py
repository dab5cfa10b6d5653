"""Deadlines under overload: EDF collapses as FCFS does, short jobs first does not, and shedding saves EDF."""

from __future__ import annotations

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.simulation import Simulation

STEP_NS = 1_000_000
MEAN_OUTPUT = 3


def attainment(queue: str, load: float, count: int = 2_000) -> float:
    """Share of requests with a first token in time, served one at a time.

    Poisson arrivals, geometric outputs of mean 3 steps, objectives of 40 or 120 steps to the first token.
    """
    random = np.random.default_rng(1)
    outputs = random.geometric(1 / MEAN_OUTPUT, count).tolist()
    arrivals = np.cumsum(random.exponential(MEAN_OUTPUT * STEP_NS / load, count)).astype(np.int64).tolist()
    objectives = random.choice([40, 120], count).tolist()
    requests = [
        Request(i, at, 1, 4000, slo=Slo(ttft_ns=ttft * STEP_NS, droppable=True), hints={"output_tokens": output})
        for i, (at, output, ttft) in enumerate(zip(arrivals, outputs, objectives, strict=True))
    ]
    limits = Limits(num_blocks=4096, max_num_seqs=1, max_model_len=4096, prefix_caching=False)
    simulation = Simulation(limits, [StackSpec(queue=queue).build()], ConstantCost(STEP_NS))
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs, strict=True))
    met = [
        r.first_token_ns is not None and r.first_token_ns <= r.arrival_ns + ttft * STEP_NS
        for r, ttft in zip(requests, objectives, strict=True)
    ]
    return sum(met) / count


def test_in_overload_edf_collapses_as_fcfs_does_and_shedding_saves_it() -> None:
    """Load 1.3: FCFS 0.06, EDF 0.05, SJF 0.86, EDF with shedding 0.75, where 1/1.3 = 0.77 of the work can be served."""
    fcfs, edf, sjf = (attainment(queue, 1.3) for queue in ("fcfs", "edf", "sjf"))
    assert fcfs < 0.1
    assert edf == pytest.approx(fcfs, abs=0.02)
    assert sjf > 0.8
    drop, demote = attainment("edf,shed=drop", 1.3), attainment("edf,shed=demote", 1.3)
    assert drop == pytest.approx(1 / 1.3, abs=0.05)
    assert demote == pytest.approx(drop, abs=0.01), "what is served late is served when there is nothing better to do"


def test_below_saturation_edf_meets_more_deadlines_than_fcfs() -> None:
    """Load 0.9: FCFS 0.92, EDF 1.00."""
    fcfs, edf = attainment("fcfs", 0.9), attainment("edf", 0.9)
    assert edf > 0.98
    assert edf > fcfs + 0.03
