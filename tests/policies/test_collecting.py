"""The garbage collector goes over everything neither during a run nor in a server that has started."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from policies.collecting import few_collections
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.simulation import Simulation


def test_thresholds_are_high_within_and_as_before_afterwards_also_after_an_error() -> None:
    before, seen = gc.get_threshold(), []

    @few_collections()
    def fails() -> None:
        seen.append(gc.get_threshold()[0])
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen[0] > before[0]
    assert gc.get_threshold() == before


def test_a_simulation_runs_within() -> None:
    before, seen = gc.get_threshold(), []
    limits = Limits(10, prefix_caching=False)
    simulation = Simulation(
        limits, [StackSpec().build()], ConstantCost(5), on_end=lambda request: seen.append(gc.get_threshold())
    )
    simulation.run([Arrival(Request(0, 0, 3, 2), 2)])
    assert gc.get_threshold() == before != seen[0]


def test_what_a_server_has_started_with_is_out_of_the_collectors_sight() -> None:
    """In a process of its own, as what is frozen stays so."""
    code = (
        "import gc, simpy; from policies.collecting import settle; settle(); there = gc.get_freeze_count();"
        "cycle = []; cycle.append(cycle); del cycle; print(there, gc.collect())"
    )
    there, collected = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert int(there) > 1000
    assert int(collected) == 1  # what comes later is seen
