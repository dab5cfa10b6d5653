"""The simulator against closed forms: one request at a time is a single-server queue."""

from __future__ import annotations

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.costs.constant import ConstantCost
from simulator.simulation import Simulation

STEP_NS = 1_000_000


def serve(outputs: np.ndarray, utilisation: float, seed: int, costs: CostModel | None = None) -> list[Request]:
    """Serve one request at a time: a service takes as many steps as the output has tokens. Poisson arrivals."""
    random = np.random.default_rng(seed)
    mean_service = outputs.mean() * STEP_NS
    gaps = random.exponential(mean_service / utilisation, len(outputs))
    gaps *= mean_service / utilisation / gaps.mean()  # the sample's utilisation is exactly the one that is meant
    arrivals = np.rint(np.cumsum(gaps)).astype(np.int64).tolist()
    limits = Limits(num_blocks=4096, max_num_seqs=1, max_model_len=4096, prefix_caching=False)
    simulation = Simulation(limits, [StackSpec().build()], costs or ConstantCost(STEP_NS))
    requests = [Request(i, at, 1, 4000) for i, at in enumerate(arrivals)]
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs.tolist(), strict=True))
    return requests


def mean_wait(requests: list[Request]) -> float:
    """Mean wait in steps, after a warm-up of a tenth."""
    kept = requests[len(requests) // 10 :]
    return float(np.mean([r.first_scheduled_ns - r.arrival_ns for r in kept])) / STEP_NS


@pytest.mark.slow
@pytest.mark.parametrize(("utilisation", "count"), [(0.5, 100_000), (0.8, 250_000)])
def test_constant_service_waits_as_long_as_in_an_m_d_1_queue(utilisation: float, count: int) -> None:
    expected = utilisation / (2 * (1 - utilisation))
    wait = mean_wait(serve(np.ones(count, np.int64), utilisation, seed=1))
    assert wait == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("utilisation", [0.5, 0.7])
def test_varied_service_waits_as_long_as_in_an_m_g_1_queue(utilisation: float) -> None:
    outputs = np.random.default_rng(100).geometric(1 / 2, 150_000)
    # Pollaczek and Khinchine: lambda E[S^2] / (2 (1 - rho)), in steps.
    rate = utilisation / outputs.mean()
    expected = rate * np.mean(outputs.astype(float) ** 2) / (2 * (1 - utilisation))
    wait = mean_wait(serve(outputs, utilisation, seed=1))
    assert wait == pytest.approx(expected, rel=0.02)


def test_every_single_wait_is_what_lindleys_recursion_gives() -> None:
    outputs = np.random.default_rng(7).geometric(1 / 4, 5_000)
    requests = serve(outputs, 0.8, seed=8)
    free_at = 0
    for request, output in zip(requests, outputs.tolist(), strict=True):
        start = max(request.arrival_ns, free_at)
        assert request.first_scheduled_ns == start
        free_at = start + output * STEP_NS
        assert request.finish_ns == free_at


def test_a_short_queue_already_waits_about_as_the_closed_form_says() -> None:
    wait = mean_wait(serve(np.ones(40_000, np.int64), 0.5, seed=3))
    assert wait == pytest.approx(0.5, rel=0.06)


def test_a_full_batch_with_constant_steps_serves_as_many_at_once_as_it_has_slots() -> None:
    limits = Limits(num_blocks=4096, max_num_seqs=4, prefix_caching=False)
    requests = [Request(i, 0, 1, 100) for i in range(8)]
    simulation = Simulation(limits, [StackSpec().build()], ConstantCost(STEP_NS))
    end = simulation.run(Arrival(r, 10) for r in requests)
    assert end == 20 * STEP_NS
    assert [r.finish_ns for r in requests] == [10 * STEP_NS] * 4 + [20 * STEP_NS] * 4
