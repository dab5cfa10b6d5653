"""Running a specification in the simulated panel: what the workload, the limits and the record have to do with it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments.divergence import diff_decisions
from experiments.metrics import summarize
from experiments.records import read_run
from experiments.replaying import replay_run
from experiments.simulated import costs_as_described, make_costs, run_simulated, simulated_limits
from experiments.spec import CostSpec, RunSpec, check_spec
from experiments.timeline import littles_law
from experiments.workloads import Workload
from policies.contract import Queue, View
from policies.control_plane import PolicyStalled
from policies.plan import Plan
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request
from policies.schedulers.mixed import Mixed
from policies.shapes import StepShape
from simulator.costs.base import CostModel
from simulator.costs.fitted import FittedCost
from simulator.costs.fitting import StepSample, fit


def spec_of(scheduler: str = "mixed", **limits: object) -> RunSpec:
    tight = {"num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 300, **limits}
    return check_spec(
        {
            "target": "sim",
            "workload": {"name": "fixed", "n": 1},
            "policies": {"scheduler": scheduler},
            "limits": tight,
            "cost": {"kind": "constant", "step_ms": 10},
        }
    )


def workload_of(count: int = 40, seed: int = 0) -> Workload:
    draw = np.random.default_rng(seed)
    arrivals = np.sort(draw.integers(0, 3_000_000_000, count))
    return Workload.build(arrivals, draw.integers(10, 150, count), draw.integers(1, 100, count))


def test_a_preempted_request_finds_its_own_blocks_again_though_nobody_shares_a_prefix(tmp_path: Path) -> None:
    run_simulated(spec_of(), tmp_path / "run", workload=workload_of(), check=True)
    run = read_run(tmp_path / "run")
    hits = run.decisions[run.decisions["kind"] == "admit"].groupby("request_id")["tokens"].agg(["first", "max"])
    preempted = set(run.requests["request_id"][run.requests["preemptions"] > 0])
    assert len(preempted) > 3
    assert (hits["first"] == 0).all()
    assert {i for i in hits.index if hits["max"][i] > 0} & preempted


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("scheduler", ["static,max_batch_size=4", "prefill_first", "mixed", "sarathi,chunk_size=32"])
def test_littles_law_holds_in_every_simulation(scheduler: str, replicas: int, lag: int, tmp_path: Path) -> None:
    spec = spec_of(scheduler, lag=lag).model_copy(update={"replicas": replicas})
    run_simulated(spec, tmp_path / "run", workload=workload_of(), check=True)
    law = littles_law(read_run(tmp_path / "run"))
    assert law.in_system > 0.3
    assert law.from_requests == pytest.approx(law.in_system, rel=1e-12)


def test_an_unknown_router_is_an_error_with_one_replica_too(tmp_path: Path) -> None:
    spec = spec_of()
    spec = spec.model_copy(update={"policies": spec.policies.model_copy(update={"router": "nonsense"})})
    with pytest.raises(PolicyError, match="nonsense"):
        run_simulated(spec, tmp_path / "run", workload=workload_of())


@pytest.mark.parametrize("lag", [0, 1])
def test_an_interrupted_simulation_replays_as_far_as_it_came(lag: int, tmp_path: Path) -> None:
    ended = 0

    def interrupt(request: Request) -> None:
        nonlocal ended
        ended += 1
        if ended == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulated(spec_of(lag=lag), tmp_path / "run", workload=workload_of(), on_end=interrupt)
    run = read_run(tmp_path / "run")
    assert not run.complete
    assert (run.requests["status"] == "unfinished").any()
    replay_run(run, tmp_path / "replay")
    assert diff_decisions(run, read_run(tmp_path / "replay")) is None


class NoOne:
    """A router that sends everybody away."""

    def route(self, *about: object) -> None:
        return None

    def on_end(self, *about: object) -> None:
        """Never called."""


def test_one_replica_has_nothing_to_route_as_in_the_real_panel(tmp_path: Path) -> None:
    spec = spec_of()
    spec = spec.model_copy(update={"policies": spec.policies.model_copy(update={"router": f"{__name__}:NoOne"})})
    run_simulated(spec, tmp_path / "one", workload=workload_of())
    assert set(read_run(tmp_path / "one").requests["status"]) <= {"stop", "length"}
    run_simulated(spec.model_copy(update={"replicas": 2}), tmp_path / "two", workload=workload_of(), check=True)
    assert set(read_run(tmp_path / "two").requests["status"]) == {"refused"}


class GivesUp(Mixed):
    """Plans nothing any more from the thirtieth step on."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self._left = 30

    def plan(self, view: View, now: int) -> Plan:
        self._left -= 1
        return super().plan(view, now) if self._left > 0 else Plan()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_whose_policy_stalled_replays_to_the_stall(lag: int, tmp_path: Path) -> None:
    with pytest.raises(PolicyStalled):
        run_simulated(spec_of(f"{__name__}:GivesUp", lag=lag), tmp_path / "run", workload=workload_of())
    run = read_run(tmp_path / "run")
    replay_run(run, tmp_path / "replay")
    replayed = read_run(tmp_path / "replay")
    assert diff_decisions(run, replayed) is None
    assert len(replayed.steps) == len(run.steps) > 30


def fitted() -> FittedCost:
    shapes = [StepShape(num_decodes=n, decode_context=50 * n, max_context=50, padded_tokens=n) for n in range(1, 30)]
    return fit([StepSample(s, 1000, 5000 + 10 * s.num_decodes, 500) for s in shapes], {"device": "made up"})


@pytest.mark.parametrize(
    "costs",
    [
        make_costs(CostSpec()),
        make_costs(CostSpec(tensor_parallel=4)),
        make_costs(CostSpec(kind="constant", step_ms=3)),
        fitted(),
    ],
    ids=["roofline", "of four devices", "constant", "fitted"],
)
def test_a_cost_model_is_made_again_from_its_description(costs: CostModel) -> None:
    again = costs_as_described(costs.describe())
    assert again.describe() == costs.describe()
    shape = StepShape(num_decodes=7, decode_context=900, max_context=300, padded_tokens=7, num_samples=7)
    assert again.cost(shape) == costs.cost(shape)


def test_graphs_are_captured_at_the_sizes_given_else_at_the_calibrations() -> None:
    provenance = {"limits": asdict(Limits(64, max_num_seqs=8, capture_sizes=(1, 2, 8)))}
    measured = FittedCost(fitted().calibration.model_copy(update={"provenance": provenance}))
    constant = make_costs(CostSpec(kind="constant", step_ms=3))
    assert simulated_limits(spec_of(), measured).capture_sizes == (1, 2, 8)
    assert simulated_limits(spec_of(capture_sizes=[1, 4]), measured).capture_sizes == (1, 4)
    assert simulated_limits(spec_of(capture_sizes=[]), measured).capture_sizes == ()
    assert simulated_limits(spec_of(), constant).capture_sizes == ()
    assert simulated_limits(spec_of(capture_sizes=[1, 4]), constant).capture_sizes == (1, 4)


def test_a_larger_share_of_a_devices_memory_holds_more_blocks() -> None:
    def num_blocks(share: float | None, devices: int = 1) -> int:
        spec = check_spec({"workload": {"name": "fixed", "n": 1}, "limits": {"memory_share": share}})
        return simulated_limits(spec, make_costs(CostSpec(tensor_parallel=devices))).num_blocks

    assert num_blocks(0.8) < num_blocks(None) == num_blocks(0.9)
    more = num_blocks(None, 2) - num_blocks(None)  # another device of 80 GB, and no further copy of the weights
    assert more == pytest.approx(0.9 * 80e9 / 2**21, abs=1)


def test_a_replay_needs_no_file_but_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted().save(tmp_path / "calibration.json")
    monkeypatch.chdir(tmp_path)
    spec = spec_of().model_copy(update={"cost": CostSpec(kind="fitted", calibration="calibration.json")})
    run_simulated(spec, tmp_path / "run", workload=workload_of())
    os.remove("calibration.json")
    replay_run(read_run(tmp_path / "run"), tmp_path / "replay")
    replay_run(read_run(tmp_path / "replay"), tmp_path / "again")  # has all that a replay needs, too
    for name in ("replay", "again"):
        assert diff_decisions(read_run(tmp_path / "run"), read_run(tmp_path / name)) is None
        assert read_run(tmp_path / name).info["cost"]["kind"] == "fitted"


def test_classes_of_objectives_reach_the_policies_the_record_and_the_metrics(tmp_path: Path) -> None:
    classes = [
        {"share": 3, "ttft_ms": 1e6, "tpot_ms": 1e6, "priority": 1},
        {"share": 1, "ttft_ms": 1e-6, "droppable": True, "value": 2.0},
    ]
    spec = check_spec(
        {
            "workload": {"name": "fixed", "n": 400, "rate": 5, "prompt_tokens": 20, "output_tokens": 3, "slo": classes},
            "cost": {"kind": "constant", "step_ms": 10},
            "limits": {"num_blocks": 1000},
        }
    )
    run_simulated(spec, tmp_path / "run")
    run = read_run(tmp_path / "run")
    strict = run.requests["slo_ttft_ns"] == 1
    assert 60 < strict.sum() < 140
    assert set(run.requests["priority"][~strict]) == {1}
    assert set(run.requests["slo_tpot_ns"].dropna()) == {10**12}
    assert list(run.requests["slo_droppable"]) == list(strict)
    summary = summarize(run)
    assert summary["slo_attainment"] == 1 - strict.sum() / 400
    assert summary["slo_goodput"] == pytest.approx((400 - strict.sum()) / summary["duration"])


def test_a_run_without_objectives_has_no_share_that_met_them(tmp_path: Path) -> None:
    spec = check_spec({"workload": {"name": "fixed", "n": 3, "rate": 5}})
    run_simulated(spec, tmp_path / "run")
    assert summarize(read_run(tmp_path / "run"))["slo_attainment"] is None
