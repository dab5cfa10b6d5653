"""The simulator against closed forms: one request at a time is a single-server queue."""

from __future__ import annotations

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.simulation import Simulation

STEP_NS = 1_000_000


def poisson(outputs: np.ndarray, utilisation: float, seed: int) -> np.ndarray:
    """Arrival times in ns; the sample's utilisation is exactly the one that is meant."""
    gaps = np.random.default_rng(seed).exponential(1.0, len(outputs))
    gaps *= outputs.mean() * STEP_NS / utilisation / gaps.mean()
    return np.rint(np.cumsum(gaps)).astype(np.int64)


def serve(outputs: np.ndarray, arrivals: np.ndarray) -> list[Request]:
    """Serve one request at a time: a service takes as many steps as the output has tokens."""
    limits = Limits(num_blocks=4096, max_num_seqs=1, max_model_len=4096, prefix_caching=False)
    simulation = Simulation(limits, [StackSpec().build()], ConstantCost(STEP_NS))
    requests = [Request(i, at, 1, 4000) for i, at in enumerate(arrivals.tolist())]
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs.tolist(), strict=True))
    return requests


def lindley(outputs: np.ndarray, arrivals: np.ndarray) -> np.ndarray:
    """When each service starts, by Lindley's recursion: start = max(arrival, end of the one before), in ns."""
    work = np.cumsum(outputs) * STEP_NS
    before = np.concatenate(([0], work[:-1]))
    return np.maximum.accumulate(arrivals - before) + before


def mean_wait(starts: np.ndarray, arrivals: np.ndarray) -> float:
    """Mean wait in steps, after a warm-up of a tenth."""
    kept = slice(len(starts) // 10, None)
    return float(np.mean(starts[kept] - arrivals[kept])) / STEP_NS


@pytest.mark.parametrize("utilisation", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("distribution", ["constant", "geometric"])
def test_waits_are_lindleys_one_by_one_and_those_average_to_pollaczeks_and_khinchines(
    distribution: str, utilisation: float
) -> None:
    """Oracle B1."""
    random, count = np.random.default_rng(100), {0.5: 400_000, 0.8: 1_000_000, 0.95: 4_000_000}[utilisation]
    outputs = np.ones(count, np.int64) if distribution == "constant" else random.geometric(1 / 2, count)
    arrivals = poisson(outputs, utilisation, seed=1)
    starts = lindley(outputs, arrivals)
    # lambda E[S^2] / (2 (1 - rho)), in steps; of constant service, rho / (2 (1 - rho)).
    rate = utilisation / outputs.mean()
    expected = rate * np.mean(outputs.astype(float) ** 2) / (2 * (1 - utilisation))
    assert mean_wait(starts, arrivals) == pytest.approx(expected, rel=0.02)
    some = slice(0, 3_000)
    requests = serve(outputs[some], arrivals[some])
    assert [r.first_scheduled_ns for r in requests] == starts[some].tolist()
    assert [r.finish_ns for r in requests] == (starts[some] + outputs[some] * STEP_NS).tolist()


def test_a_full_batch_with_constant_steps_serves_as_many_at_once_as_it_has_slots() -> None:
    limits = Limits(num_blocks=4096, max_num_seqs=4, prefix_caching=False)
    requests = [Request(i, 0, 1, 100) for i in range(8)]
    simulation = Simulation(limits, [StackSpec().build()], ConstantCost(STEP_NS))
    end = simulation.run(Arrival(r, 10) for r in requests)
    assert end == 20 * STEP_NS
    assert [r.finish_ns for r in requests] == [10 * STEP_NS] * 4 + [20 * STEP_NS] * 4
