"""A request's life is told from the records as it was, and every nanosecond of its waiting has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.life import DECODE, MOVING, PREFILL, WAITING, Life, Span, Wait, request_life
from experiments.records import Run, RunError, RunWriter, read_run
from experiments.timeline_plots import life_figure
from policies.contract import Route
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.experiments.fake_run import FakeRequest, fake_info, fake_run, random_requests
from tests.simulator.test_transfers import To


@pytest.fixture(scope="module", params=[0, 1], ids=["lag 0", "lag 1"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fake_run(
        tmp_path_factory.mktemp("life") / "run", random_requests(80, seed=3, cancelled=0.1), lag=request.param
    )


def test_a_life_is_whole_from_arrival_to_end(run: Run) -> None:
    rows = run.requests[run.requests["first_token_ns"].notna() & run.requests["finish_ns"].notna()]
    assert rows["preemptions"].sum() > 0
    for row in rows.itertuples():
        life = request_life(run, row.request_id)
        assert life.spans[0].begin_ns == row.arrival_ns
        assert life.spans[-1].end_ns == row.finish_ns
        assert all(one.end_ns == two.begin_ns for one, two in zip(life.spans, life.spans[1:], strict=False))
        assert life.total_ns(WAITING) >= row.first_scheduled_ns - row.arrival_ns
        if not row.preemptions:
            assert [span.phase for span in life.spans if span.phase != WAITING][:1] == [PREFILL]
            assert life.total_ns(WAITING) == row.first_scheduled_ns - row.arrival_ns
            prefill = next(span for span in life.spans if span.phase == PREFILL)
            assert prefill.end_ns == row.first_token_ns
        elif row.status in ("stop", "length"):
            assert sum(span.phase == WAITING for span in life.spans) >= row.preemptions


def test_all_of_its_waiting_has_a_reason(run: Run) -> None:
    for request_id in run.requests["request_id"]:
        life = request_life(run, request_id)
        assert sum(wait.end_ns - wait.begin_ns for wait in life.waits) == life.total_ns(WAITING)
        assert all(wait.why for wait in life.waits)


def test_why_it_waited_is_said_in_words(tmp_path: Path) -> None:
    # 32 tokens a step: 0 takes three steps for its prompt; 1 may start with what the third one leaves, 2 behind it.
    first, second, third = FakeRequest(0, 90, 2, 2), FakeRequest(1, 64, 2, 2), FakeRequest(2, 30, 1, 1)
    run = fake_run(tmp_path / "run", [first, second, third])
    budget = "as the step's token budget was used up"
    due = Wait(2, 10_032_000, "the next plan was not due: a step was running")
    assert request_life(run, 2).waits == (
        due,
        Wait(10_032_000, 20_064_000, budget.removeprefix("as "), behind=1),
        Wait(20_064_000, 40_128_000, f"it was looked at and passed over, {budget}"),
    )
    assert request_life(run, 1).sentences() == [
        f"10.0 ms: it was looked at and passed over, {budget}",
        f"10.0 ms: {due.why}",
    ]
    assert f"10.0 ms: it stood behind request 1, which was passed over, {budget}" in request_life(run, 2).sentences()
    alone = request_life(fake_run(tmp_path / "alone", [first]), 0)
    assert alone.sentences() == []
    assert [span.phase for span in alone.spans] == [PREFILL, DECODE]


def test_waits_for_one_reason_are_added_up_whoever_it_stood_behind() -> None:
    waits = (
        Wait(0, 5_000_000, "no room", 7),
        Wait(5_000_000, 6_000_000, "late"),
        Wait(6_000_000, 9_000_000, "no room", 8),
    )
    assert Life(1, 0, None, None, "stop", 1, 1, (), waits).sentences() == [
        "8.0 ms: it stood behind 2 others, one after the other, which were passed over, as no room "
        "(longest behind request 7: 5.0 ms)",
        "1.0 ms: late",
    ]


def test_a_request_that_is_not_there_is_named(run: Run) -> None:
    with pytest.raises(RunError, match="no request 999"):
        request_life(run, 999)


@pytest.mark.parametrize("decisions", [True, False])
def test_a_request_that_moves_has_a_lane_on_each_replica(tmp_path: Path, decisions: bool) -> None:
    """Prefill 0 to 1,000 on replica 0; its KV takes 305 ns; three more tokens, a step each, on replica 1."""
    limits = Limits(64, 4)
    info = fake_info(limits=limits)
    with RunWriter(tmp_path / "run", info, flush_seconds=None, decisions=decisions) as writer:
        stacks = [StackSpec().build(block_size=4) for _ in range(2)]
        link = LinkSpeed(1e9, 100, latency_ns=5)
        simulation = Simulation(limits, stacks, ConstantCost(1_000), To(Route(0, 1)), link=link, recorder=writer)
        simulation.run([Arrival(Request(0, 0, 10, 4), 4)])
    life = request_life(read_run(tmp_path / "run"), 0)
    moved = (Span(MOVING, 1_000, 1_305, 1), Span(DECODE, 1_305, 4_305, 1))
    if not decisions:  # nobody knows how long the KV was on its way
        moved = (Span(DECODE, 1_000, 4_305, 1),)
    assert life.spans == (Span(PREFILL, 0, 1_000, 0), *moved)
    assert life.lanes("sim") == {0: "sim, replica 0", 1: "sim, replica 1"}
    assert life.first_token_replica == 0
    drawn = life_figure({"sim": life})
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == ["sim, replica 0", "sim, replica 1"]
