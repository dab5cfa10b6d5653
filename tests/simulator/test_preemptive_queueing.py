"""Preemptive orders on one server: every single end as a plain reference has it. Means: `test_queueing_laws`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.simulation import Simulation

STEP_NS = 1_000_000


def poisson(outputs: np.ndarray, utilisation: float, seed: int) -> list[int]:
    """Arrivals at which one server is exactly so busy."""
    gaps = np.random.default_rng(seed).exponential(1, len(outputs))
    gaps *= outputs.mean() * STEP_NS / utilisation / gaps.mean()
    return np.rint(np.cumsum(gaps)).astype(np.int64).tolist()


def serve(queue: str, outputs: np.ndarray, arrivals: list[int], mode: str = "keep") -> list[int]:
    """When each ends that is served alone, a step a token; who is stopped goes on where it was."""
    limits = Limits(num_blocks=400_000, max_num_seqs=1, max_model_len=4096, prefix_caching=False)
    oracle = dict(enumerate(outputs.tolist()))
    stack = StackSpec(f"preemptive,mode={mode}", queue).build(oracle=oracle)
    requests = [Request(i, at, 1, 4000) for i, at in enumerate(arrivals)]
    simulation = Simulation(limits, [stack], ConstantCost(STEP_NS))
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs.tolist(), strict=True))
    return [request.finish_ns or 0 for request in requests]


def reference(rank: Callable[[int, int], float], outputs: np.ndarray, arrivals: list[int]) -> list[int]:
    """The same, step by step over all that are there: the least `rank(served, size)` is served, ties by arrival."""
    served, end = [0] * len(arrivals), [0] * len(arrivals)
    here: list[int] = []
    now, come = 0, 0
    while come < len(arrivals) or here:
        now = now if here else max(now, arrivals[come])
        while come < len(arrivals) and arrivals[come] <= now:
            here.append(come)
            come += 1
        chosen = min(here, key=lambda i: (rank(served[i], outputs[i]), i))
        now += STEP_NS
        served[chosen] += 1
        if served[chosen] == outputs[chosen]:
            here.remove(chosen)
            end[chosen] = now
    return end


RANKS: dict[str, Callable[[int, int], float]] = {
    "fcfs": lambda served, size: 0,
    "srpt,predictor=oracle": lambda served, size: size - served,
    "las,quantum_ms=0": lambda served, size: served,
    "las,quantum_ms=3": lambda served, size: served // 3,
}


@pytest.mark.parametrize(
    ("mode", "queue"),
    [*(("keep", queue) for queue in RANKS), ("recompute", "srpt,predictor=oracle")],
)
def test_every_single_end_is_what_the_definition_gives(queue: str, mode: str) -> None:
    """A recompute is free here: of so short a sequence it takes the step that its next token takes."""
    outputs = np.random.default_rng(7).geometric(1 / 6, 400)
    arrivals = poisson(outputs, 0.8, seed=8)
    assert serve(queue, outputs, arrivals, mode) == reference(RANKS[queue], outputs, arrivals)


@pytest.mark.parametrize("queue", ["mlfq,quantum_ms=2", "mlfq,quantum_ms=0", "plas,quantum_ms=2", "las,quantum_ms=5"])
def test_no_work_is_lost_or_put_off(queue: str) -> None:
    """The server is busy when there is anything to do: busy periods end when they do under first come, first served."""
    outputs = np.random.default_rng(9).geometric(1 / 6, 250)
    arrivals = poisson(outputs, 0.7, seed=10)

    def idle_from(ends: list[int]) -> list[int]:
        done, late = sorted(ends), sorted(arrivals)
        return [end for i, end in enumerate(done, 1) if i == len(late) or late[i] > end]

    expected = idle_from(reference(RANKS["fcfs"], outputs, arrivals))
    assert idle_from(serve(queue, outputs, arrivals)) == expected
    assert 10 < len(expected) < 200
