"""Requests that come because others have ended."""

from __future__ import annotations

import pytest

from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log

LIMITS = Limits(40, block_size=4, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=96, prefix_caching=False)


@pytest.mark.parametrize("together", [False, True])
def test_a_failed_replica_serves_nobody_who_comes_after_those_that_it_has_let_down(together: bool) -> None:
    def next_try(request: Request, now: int) -> list[Arrival]:
        return [Arrival(Request(request.id + 1, now, 8, 20), 20)] if request.id < 5 else []

    log = Log()
    simulation = Simulation(
        LIMITS, [StackSpec().build()], LinearCost(1000), recorder=log, followers=next_try, together=together
    )
    simulation.at(5500, lambda: simulation.fail(0))
    simulation.run([Arrival(Request(0, 0, 8, 20), 20)])
    rows = [dict(zip(REQUESTS, row, strict=True)) for row in log.requests]
    assert [row["request_id"] for row in rows] == list(range(6))
    assert {row["status"] for row in rows} == {"cancelled"}
    assert [row["output_tokens"] for row in rows[1:]] == [0] * 5
