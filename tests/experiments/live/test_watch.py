"""A watched server and its twin: with the same cost model they do the same, and their difference is what it is."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from experiments.live.series import COLUMNS, errors, recent
from experiments.live.server import About, Engine, EngineState, Event, LiveError, Page
from experiments.live.watch import Watch, differences
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.costs.constant import LinearCost
from simulator.simulation import Simulation
from tests.policies.harness import Log

LIMITS = Limits(60, 4, 6, 32, 96, prefix_caching=False)
SECOND = 10**9


def cost(speed: float = 1.0) -> LinearCost:
    return LinearCost(20_000_017 / speed, 100_003 / speed, 1_009 / speed)


class Told:
    """In a server's place: a simulation of 150 requests in about 20 s, of which it tells as they come and end."""

    def __init__(self, stack: StackSpec | None = None) -> None:
        draw, now, log = random.Random(5), 0, Log()
        self.requests = []
        for i in range(150):
            now += draw.randrange(1, 260_000_001)
            self.requests.append((Request(i, now, draw.randint(1, 40), 30), draw.randint(1, 30)))
        self.stack = stack or StackSpec()
        simulation = Simulation(LIMITS, [self.stack.build()], cost(), recorder=log)
        simulation.run(Arrival(fresh(request), output) for request, output in self.requests)
        self.rows = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in log.requests}
        self.now_ns = 0
        self.run = "first"
        self.lost = 0

    def about(self) -> About:
        return About("m", "1", [Engine(asdict(LIMITS), self.stack.as_dict())])

    def close(self) -> None:
        pass

    def events(self, after: int, limit: int = 40) -> Page:
        told = [
            (r.arrival_ns, 0, Event("arrival", r.id, r.arrival_ns, r.num_prompt_tokens, 30)) for r, _ in self.requests
        ]
        for i, row in self.rows.items():
            end = Event(
                "end", i, row["finish_ns"], first_token_ns=row["first_token_ns"],
                output_tokens=row["output_tokens"], reason=row["status"],
            )  # fmt: skip
            told.append((row["finish_ns"], 1, end))
        known = [event for at, _, event in sorted(told, key=lambda one: one[:2]) if at <= self.now_ns]
        page = [event for number, event in enumerate(known) if number > max(after, self.lost - 1)][:limit]
        last = max(after, self.lost - 1) + len(page)
        alive = [i for i, row in self.rows.items() if row["arrival_ns"] <= self.now_ns < row["finish_ns"]]
        return Page(
            self.run, self.lost, last, last < len(known) - 1, page, self.now_ns, sum(map(self.tokens, self.rows)),
            [(i, self.tokens(i)) for i in alive], self.stack.as_dict(), None,
            [EngineState(0, "serving", len(alive), 0, 60, 60 - len(alive))],
        )  # fmt: skip

    def tokens(self, i: int) -> int:
        """Of a request so far; no more than it has, if sometimes fewer."""
        row = self.rows[i]
        since = (self.now_ns - row["first_token_ns"]) / max(1, row["finish_ns"] - row["first_token_ns"])
        return int(np.clip(since, 0, 1) * (row["output_tokens"] - 1)) + (since >= 1) if since >= 0 else 0


def fresh(request: Request) -> Request:
    return Request(request.id, request.arrival_ns, request.num_prompt_tokens, request.max_tokens)


def watch(told: Any, costs: CostModel) -> Watch:
    return Watch(told, lambda about: costs)


def followed(told: Told, costs: CostModel, attach_s: float = 0.0) -> Watch:
    """Attached after some seconds, and then looked at every second to the end."""
    told.now_ns = round(attach_s * SECOND)
    watched = watch(told, costs)
    while told.now_ns < 40 * SECOND:
        told.now_ns += SECOND
        watched.poll(10.0)
    return watched


def test_a_twin_with_the_servers_own_step_times_does_what_the_server_does_to_the_nanosecond() -> None:
    watched = followed(Told(), cost())
    assert len(watched.pairs()) == 150
    assert watched.twin_fates == watched.server_fates
    assert [row.error for row in differences(watched.pairs())] == [0.0] * 6


def test_the_error_of_a_slower_twin_is_that_of_a_simulation_afterwards() -> None:
    told, costs, log = Told(), cost(0.8), Log()
    watched = followed(told, costs)
    simulation = Simulation(LIMITS, [StackSpec().build()], costs, recorder=log)
    simulation.run(Arrival(fresh(request), output) for request, output in told.requests)
    after = {row[0]: dict(zip(REQUESTS, row, strict=True)) for row in log.requests}
    assert len(watched.twin_fates) == 150
    for i, fate in watched.twin_fates.items():
        assert (fate.first_token_ns, fate.end_ns) == (after[i]["first_token_ns"], after[i]["finish_ns"])
    e2e = [np.mean([row["finish_ns"] - row["arrival_ns"] for row in of.values()]) for of in (told.rows, after)]
    rows = {(row.latency, row.statistic): row for row in differences(watched.pairs())}
    assert rows["E2E", "mean"].error == pytest.approx(e2e[1] / e2e[0] - 1, rel=1e-9)
    assert rows["TPOT", "p99"].error > 0.1


def test_who_attaches_later_compares_those_that_come_later_under_the_load_that_was_there() -> None:
    watched = followed(Told(), cost(), attach_s=8.0)
    compared = watched.pairs()
    assert min(fate.arrival_ns for fate, _ in compared) > 8 * SECOND
    assert 60 < len(compared) < len(watched.twin_fates) < 150
    # Those that ran when the first of them came were on their way for longer than the twin knows: it errs a little.
    assert abs(differences(compared)[4].error) < 0.02


def test_a_faster_twin_is_behind_and_loses_nothing() -> None:
    told = Told()
    watched = watch(told, cost(4.0))
    behind = []
    while told.now_ns < 40 * SECOND:
        told.now_ns += SECOND
        watched.poll(10.0)
        behind.append(watched.lag_s)
    assert max(behind[:15]) > 0.3
    assert (behind[-1], len(watched.pairs())) == (0.0, 150)


def test_a_restart_lost_events_and_other_policies_begin_it_anew_and_it_is_said_why() -> None:
    told = Told()
    watched = followed(told, cost())
    assert watched.renewed == ""
    told.run = "second"
    watched.poll()
    assert "started anew" in watched.renewed
    assert watched.pairs() == []
    told.lost = 10**6
    watched.poll()
    assert "more events" in watched.renewed
    told.lost, told.stack = 0, replace(StackSpec(), queue="priority")
    watched.poll()
    assert "policies" in watched.renewed


def test_no_module_is_imported_because_a_server_says_so() -> None:
    for field, policy in (("queue", "os:system"), ("scheduler", "stale,router=os:system")):
        told = Told()
        told.stack = replace(StackSpec(), **{field: policy})
        with pytest.raises(LiveError, match="not one of those that come with Diptych"):
            watch(told, cost())


def test_the_curves_of_both_sides_end_where_each_is() -> None:
    told = Told()
    watched = watch(told, cost(4.0))
    for _ in range(14):
        told.now_ns += SECOND
        watched.poll(10.0)
    frames = recent(watched, 10.0)
    for frame in frames.values():
        assert list(frame) == ["t_s", *COLUMNS]
        assert (frame["t_s"].iloc[0], frame["t_s"].iloc[-1]) == (-10.0, 0.0)
    server, twin = frames["server"], frames["twin"]
    assert server["running"].iloc[-1] == watched.samples[-1].running
    known = twin["t_s"] <= -watched.lag_s
    assert twin["running"].notna().tolist() == known.tolist()
    # Output tokens of both sides over the last second that the twin knows of, from its own requests' times.
    at = twin["t_s"][known].iloc[-1]
    end_ns = round(watched.now_ns + at * 1e9)
    steps = watched.twin.steps()
    since = end_ns - 10 * SECOND // 12
    made = steps["num_samples"][(steps["end_ns"] > since) & (steps["end_ns"] <= end_ns)].sum()
    assert twin["tokens_per_s"][known].iloc[-1] == pytest.approx(made / (10 / 12), rel=1e-6)
    assert errors(watched, 10.0)["t_s"].is_monotonic_increasing
