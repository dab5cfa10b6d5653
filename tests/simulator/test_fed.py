"""A simulation that is fed as a live server tells of its requests makes what a whole one makes of them afterwards."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.records import REQUESTS
from policies.registry import make
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.fed import FedSimulation
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.policies.harness import Log

LIMITS = Limits(40, 4, 4, 24, 96, prefix_caching=False)


@dataclass(frozen=True)
class Asked:
    """A request, its true length, and when its client goes away."""

    at: int
    prompt: int
    output: int
    cap: int
    leaves: int | None

    def request(self, i: int) -> Request:
        return Request(i, self.at, self.prompt, self.cap)


def draw(seed: int) -> list[Asked]:
    random_ = random.Random(seed)
    asked, now = [], 0
    for _ in range(25):
        now += random_.randrange(1, 15_000_001)
        output = random_.randint(1, 25)
        leaves = now + random_.randrange(1, 90_000_001) if random_.random() < 0.15 else None
        asked.append(Asked(now, random_.randint(1, 40), output, output + random_.choice([0, 0, 9]), leaves))
    return asked


def cost(speed: float) -> LinearCost:
    return LinearCost(3_000_017 / speed, 100_003 / speed, 1_009 / speed)


def parts(log: Log) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    return sorted(log.requests), sorted(log.steps)


def whole(asked: list[Asked], costs: LinearCost, limits: Limits, replicas: int) -> Log:
    log = Log()
    router = make("router", "least_tokens") if replicas > 1 else None
    simulation = Simulation(limits, [StackSpec().build() for _ in range(replicas)], costs, router, recorder=log)
    for i, one in enumerate(asked):
        if one.leaves is not None:
            simulation.at(one.leaves, lambda i=i: simulation.cancel(i))  # type: ignore[misc]
    simulation.run(Arrival(one.request(i), one.output) for i, one in enumerate(asked))
    return log


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    speed=st.sampled_from([0.3, 0.95, 1.0, 1.3, 5.0]),
    lag=st.sampled_from([0, 1]),
    replicas=st.sampled_from([1, 2]),
    every=st.sampled_from([1_000_000, 7_000_000, 60_000_000]),
)
def test_fed_with_what_a_server_has_told_so_far_it_decides_as_if_it_had_known_everything(
    seed: int, speed: float, lag: int, replicas: int, every: int
) -> None:
    asked, limits = draw(seed), Limits(40, 4, 4, 24, 96, prefix_caching=False, lag=lag)
    server = [dict(zip(REQUESTS, row, strict=True)) for row in whole(asked, cost(1.0), LIMITS, 1).requests]
    told = {row["request_id"]: row for row in server}
    left = {i for i, row in told.items() if row["status"] == "cancelled"}
    # Of a request whose client has left nobody ever learns the true length: its cap is as good as any.
    truth = [
        replace(one, output=one.cap, leaves=told[i]["finish_ns"]) if i in left else replace(one, leaves=None)
        for i, one in enumerate(asked)
    ]

    log = Log()
    router = make("router", "least_tokens") if replicas > 1 else None
    twin = FedSimulation(
        limits, [StackSpec().build() for _ in range(replicas)], cost(speed), router, recorder=log, check=True
    )
    over: set[int] = set()
    came: set[int] = set()
    now = 0
    while len(over) < len(asked):
        now += every
        for i, one in enumerate(asked):
            row = told[i]
            if one.at <= now and i not in came:
                came.add(i)
                twin.feed(Arrival(one.request(i), one.cap), known=False)
            if i in came and i not in over:
                if row["finish_ns"] <= now:
                    over.add(i)
                    if i in left:
                        twin.cancelled(i, row["finish_ns"])
                    else:
                        twin.ended(i, row["output_tokens"])
                elif row["first_token_ns"] is not None and row["first_token_ns"] <= now:
                    share = (now - row["first_token_ns"]) / (row["finish_ns"] - row["first_token_ns"])
                    twin.reached(i, int(share * (row["output_tokens"] - 1)))
        assert twin.advance(now)
        assert twin.now_ns <= now
    while not twin.advance(10**12, max_events=3):
        pass
    assert not twin.held
    oracle = whole(truth, cost(speed), limits, replicas)
    assert parts(log) == parts(oracle)


def test_the_clock_stands_where_a_request_may_have_had_its_last_token() -> None:
    log = Log()
    twin = FedSimulation(LIMITS, [StackSpec().build()], LinearCost(1_000_000), recorder=log)
    twin.feed(Arrival(Request(0, 0, 4, 20), 20), known=False)
    twin.advance(50_000_000)
    assert (twin.held, twin.now_ns) == (True, 0)  # the first token may be the last one
    twin.reached(0, 3)
    twin.advance(50_000_000)
    assert (twin.held, twin.now_ns) == (True, 3_000_000)
    twin.reached(0, 1)
    twin.feed(Arrival(Request(1, 3_500_000, 4, 2), 2), known=True)
    twin.advance(50_000_000)
    assert (twin.held, twin.now_ns) == (True, 3_000_000)
    twin.ended(0, 5)
    twin.advance(50_000_000)
    assert not twin.held
    rows = [dict(zip(REQUESTS, row, strict=True)) for row in log.requests]
    assert [(r["request_id"], r["output_tokens"], r["finish_ns"], r["status"]) for r in rows] == [
        (0, 5, 5_000_000, "stop"),
        (1, 2, 6_000_000, "length"),
    ]


def test_it_waits_at_the_first_token_of_a_request_that_goes_elsewhere_after_it_too() -> None:
    logs = [Log(), Log()]
    made = [
        kind(
            LIMITS, [StackSpec().build() for _ in range(2)], LinearCost(1000), make("router", "disaggregated"),
            link=LinkSpeed(1e9, 64, 0), recorder=log,
        )
        for kind, log in zip((Simulation, FedSimulation), logs, strict=True)
    ]  # fmt: skip
    simulation, fed = made
    simulation.run([Arrival(Request(0, 0, 8, 20), 1)])
    assert isinstance(fed, FedSimulation)
    fed.feed(Arrival(Request(0, 0, 8, 20), 20), known=False)
    fed.advance(500_000)
    assert fed.held
    fed.ended(0, 1)
    fed.advance(1_000_000)
    assert logs[0].requests == logs[1].requests
